"""A checkpoint of a published shape with random weights, bfloat16, written from the GPU."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loadtests.peers.checkpoints import tokenizer_of
from model.families import family_of, read_config
from model.families.published import PUBLISHED
from model.random_weights import random_model


@contextmanager
def roomy_folder(num_bytes: int) -> Iterator[Path]:
    """A folder for so many bytes, on a disk or in memory. Raises `OSError` where there is none."""
    places = [Path(tempfile.gettempdir()), Path("/dev/shm")]
    for place in places:
        if place.is_dir() and shutil.disk_usage(place).free > num_bytes:
            with tempfile.TemporaryDirectory(dir=place, prefix="vitrine-") as folder:
                yield Path(folder)
            return
    raise OSError(f"{num_bytes:,} bytes are free in none of {', '.join(map(str, places))}")


def write_random(shape: str, folder: Path, device: str) -> None:
    """config.json, model.safetensors and a tokenizer of the right size."""
    fields = PUBLISHED[shape]
    config, family = read_config(fields), family_of(fields)
    model = random_model(config, config.max_positions, torch.device(device), torch.bfloat16, 0)
    own, tensors = model.state_dict(), dict[str, Tensor]()
    for name, source in family.sources(config, family.prefixes[0]).items():
        parts = own[name].split(list(source.rows or own[name].shape[:1]))
        for published, part in zip(source.names, parts, strict=True):
            whole = part.t() if source.transposed else part
            tensors[published] = whole.contiguous().cpu().clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_of(config.vocab_size)))
    del model, own, tensors
    if device == "cuda":  # others want the memory now
        torch.cuda.empty_cache()
