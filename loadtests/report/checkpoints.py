"""Checkpoints of published shapes with random weights, so that `vitrine serve` can serve them: what
a step costs does not depend on what the weights say. In the Hugging Face layout, bfloat16.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from loadtests.peers.checkpoints import END_OF_TEXT, tokenizer_of
from model.families import family_of, read_config
from model.families.published import PUBLISHED
from model.transformer import Transformer

STD = 0.02


def make_checkpoint(shape: str, folder: Path) -> Path:
    """The checkpoint of a published shape under `folder`; made if it is not there."""
    target = folder / shape
    if target.exists():
        return target
    beside = folder / f"{shape}.part"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    raw = PUBLISHED[shape] | {"bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16"}
    save_file(_weights(raw), beside / "model.safetensors", metadata={"format": "pt"})
    (beside / "config.json").write_text(json.dumps(raw))
    config = read_config(raw)
    (beside / "tokenizer.json").write_text(json.dumps(tokenizer_of(config.vocab_size)))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    (beside / "tokenizer_config.json").write_text(json.dumps(names))
    beside.rename(target)
    return target


def _weights(raw: dict[str, object]) -> dict[str, torch.Tensor]:
    """Every published tensor of the family, by where our parameters come from."""
    family, config = family_of(raw), read_config(raw)
    with torch.device("meta"):
        parameters = dict(Transformer(config, max_positions=1).named_parameters())
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for ours, source in family.sources(config, family.prefixes[0]).items():
        shape = list(parameters[ours].shape)
        for name, rows in zip(source.names, source.rows or (shape[0],), strict=True):
            size = [rows, *shape[1:]]
            size = size[::-1] if source.transposed else size
            weights[name] = _values(name, size, generator)
    return weights


def _values(name: str, size: list[int], generator: torch.Generator) -> torch.Tensor:
    if len(size) == 2:
        drawn = torch.empty(size, dtype=torch.bfloat16)
        return drawn.normal_(std=STD, generator=generator)
    return torch.full(size, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)


if __name__ == "__main__":
    # python -m loadtests.report.checkpoints gpt2 runs/checkpoints
    if sys.argv[1] not in PUBLISHED:
        raise SystemExit(f"{sys.argv[1]!r} is none of the shapes {', '.join(sorted(PUBLISHED))}")
    print(make_checkpoint(sys.argv[1], Path(sys.argv[2])))
