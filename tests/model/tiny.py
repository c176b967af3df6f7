"""Tiny checkpoints of random weights, written without transformers, for loader tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.families import family_of, read_config
from model.transformer import Transformer

LLAMA: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, object] = {
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}


def published_tensors(fields: Mapping[str, object], prefix: str | None = None) -> dict[str, Tensor]:
    """Random weights under the names a checkpoint of this config has."""
    torch.manual_seed(0)
    config, family = read_config(fields), family_of(fields)
    ours = Transformer(config).state_dict()
    tensors: dict[str, Tensor] = {}
    prefix = family.prefixes[0] if prefix is None else prefix
    for name, source in family.sources(config, prefix).items():
        parts = ours[name].split(list(source.rows or ours[name].shape[:1]))
        for published, part in zip(source.names, parts, strict=True):
            tensors[published] = (part.t() if source.transposed else part).contiguous().clone()
    return tensors


def write_config(directory: Path, fields: Mapping[str, object]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))


def write(directory: Path, fields: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    """config.json and model.safetensors."""
    write_config(directory, fields)
    save_file(dict(tensors), directory / "model.safetensors")
    return directory


def write_shards(
    directory: Path, fields: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """config.json and two shards; returns the index's weight_map, and writes it."""
    write_config(directory, fields)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object, name: str = "model.safetensors") -> None:
    (directory / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
