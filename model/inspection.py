"""What a model is made of: every matrix with its size, from the config alone.

The counts are taken from the module itself, built on the meta device where parameters have
shapes and no memory, so what is shown is what would be loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from model.checkpoint_files import CheckpointError, read_checkpoint_info, read_config_file
from model.config import ModelConfig
from model.families import read_config
from model.families.published import PUBLISHED
from model.kv_cache import bytes_per_block
from model.transformer import Transformer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One kind of parameter: how it looks once, and how often the model has it."""

    group: str  # "embedding", "attention", "MLP", "norms", "head"
    name: str
    shape: tuple[int, ...]
    per_layer: int  # how many a layer; 0: it stands outside of the layers
    count: int  # how many in the whole model

    @property
    def size(self) -> int:
        """Parameters of one."""
        return torch.Size(self.shape).numel()

    @property
    def total(self) -> int:
        """Parameters of all of them."""
        return self.size * self.count


@dataclass(frozen=True, slots=True)
class Inspection:
    """An architecture in numbers. `num_parameters` counts shared parameters once."""

    config: ModelConfig
    matrices: tuple[Matrix, ...]
    num_parameters: int

    def total(self, name: str) -> int:
        """Parameters of every matrix called `name`."""
        return sum(matrix.total for matrix in self.matrices if matrix.name == name)

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all parameters in `dtype`."""
        return self.num_parameters * dtype.itemsize

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one token leaves in the cache."""
        return bytes_per_block(self.config, 1, dtype)


def find_config(model: str) -> ModelConfig:
    """The config of a checkpoint directory, of a config.json, or of a published model named
    in `model/families/published.py`; looked for in this order.

    Raises `CheckpointError` for what cannot be read and for an unknown name.
    """
    path = Path(model)
    if path.is_dir():
        return read_checkpoint_info(path).config
    if path.is_file():
        return read_config_file(path)
    if model.lower() in PUBLISHED:
        return read_config(PUBLISHED[model.lower()])
    raise CheckpointError(
        f"{model} is neither a directory nor a file nor one of {', '.join(PUBLISHED)}"
    )


def inspect(config: ModelConfig) -> Inspection:
    """Count every matrix of an architecture."""
    with torch.device("meta"):
        model = Transformer(config, max_positions=1)
    unique = sum(parameter.numel() for parameter in model.parameters())
    return Inspection(config, tuple(_matrices(model)), unique)


def _matrices(model: Transformer) -> Iterator[Matrix]:
    config = model.config

    def outside(group: str, name: str, tensor: Tensor) -> Matrix:
        return Matrix(group, name, tuple(tensor.shape), per_layer=0, count=1)

    yield outside("embedding", "token embedding", model.embedding.weight)
    if model.position_embedding is not None:
        yield outside("embedding", "position embedding", model.position_embedding.weight)
    # All layers are alike: look at the first one.
    for name, parameter in model.blocks[0].named_parameters():
        yield from _layer_matrices(config, name, parameter)
    for name, parameter in model.final_norm.named_parameters():
        yield outside("norms", f"final norm {name}", parameter)
    if not config.tie_embeddings:
        yield outside("head", "LM head", model.lm_head.weight)


def _layer_matrices(config: ModelConfig, name: str, parameter: Tensor) -> Iterator[Matrix]:
    """One parameter of a block as the matrices it stands for, fused ones taken apart."""
    module, _, kind = name.rpartition(".")
    suffix = "" if kind == "weight" else " bias"
    if module == "attention.qkv":
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        for part, count in zip(("W_Q", "W_K", "W_V"), heads, strict=True):
            shape = (config.head_dim, *parameter.shape[1:])
            yield Matrix("attention", part + suffix, shape, count, count * config.num_layers)
        return
    if module == "mlp.gate_up":
        for part in ("W_gate", "W_up"):
            shape = (config.intermediate_size, *parameter.shape[1:])
            yield Matrix("MLP", part + suffix, shape, 1, config.num_layers)
        return
    names = {
        "attention.out": ("attention", "W_O" + suffix),
        "mlp.up": ("MLP", "W_up" + suffix),
        "mlp.down": ("MLP", "W_down" + suffix),
    }
    norm = module.rpartition(".")[2].replace("_", " ")
    group, shown = names.get(module, ("norms", f"{norm} {kind}"))
    yield Matrix(group, shown, tuple(parameter.shape), 1, config.num_layers)


def render(inspection: Inspection) -> Group:
    """Tables for a terminal: the architecture, its matrices, and the bytes they take."""
    return Group(
        _architecture_table(inspection.config),
        _matrix_table(inspection),
        _bytes_table(inspection),
    )


def _architecture_table(config: ModelConfig) -> Table:
    table = Table(title="architecture", show_header=False, title_justify="left")
    kind = "multi-head"
    if config.num_kv_heads < config.num_heads:
        kind = "multi-query" if config.num_kv_heads == 1 else "grouped-query"
    scaling = f", {config.rope_scaling.kind} scaling" if config.rope_scaling else ""
    position = config.position + (
        f", theta {config.rope_theta:,.0f}{scaling}" if config.position == "rotary" else ""
    )
    rows = [
        ("family", config.family),
        ("layers", f"{config.num_layers}"),
        ("hidden size (d_model)", f"{config.hidden_size:,}"),
        ("attention", f"{kind}, {config.num_heads} query and {config.num_kv_heads} KV heads"),
        ("head dimension (d_k)", f"{config.head_dim}"),
        ("MLP", f"{config.mlp}, {config.intermediate_size:,} wide"),
        ("norm", f"{config.norm}, epsilon {config.norm_eps:g}"),
        ("positions", position),
        ("context", f"{config.max_positions:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("embeddings", "tied to the head" if config.tie_embeddings else "head of their own"),
    ]
    extras = [
        text
        for text, there in (
            ("bias on query, key and value", config.qkv_bias),
            ("norm on query and key", config.qk_norm),
        )
        if there
    ]
    windows = [window for window in config.sliding_windows if window is not None]
    if windows:
        extras.append(f"a window of {windows[0]:,} in {len(windows)} layers")
    if extras:
        rows.append(("also", ", ".join(extras)))
    for row in rows:
        table.add_row(*row)
    return table


def _matrix_table(inspection: Inspection) -> Table:
    table = Table(title="parameters", title_justify="left", show_footer=True)
    table.add_column("matrix", footer="total")
    table.add_column("shape", justify="right")
    table.add_column("one", justify="right")
    table.add_column("a layer", justify="right")
    table.add_column("all layers", justify="right", footer=f"{inspection.num_parameters:,}")
    table.add_column("share", justify="right")
    previous = ""
    for matrix in inspection.matrices:
        if matrix.group != previous and previous:
            table.add_section()
        previous = matrix.group
        per_head = matrix.name.startswith(("W_Q", "W_K", "W_V"))
        in_layer = f"{matrix.size * matrix.per_layer:,}" if matrix.per_layer else "-"
        table.add_row(
            matrix.name + (" of one head" if per_head else ""),
            " x ".join(f"{size:,}" for size in matrix.shape),
            f"{matrix.size:,}",
            in_layer,
            f"{matrix.total:,}",
            f"{matrix.total / inspection.num_parameters:.1%}",
        )
    return table


def _bytes_table(inspection: Inspection) -> Table:
    table = Table(title="bytes", title_justify="left")
    table.add_column("dtype")
    table.add_column("weights", justify="right")
    table.add_column("KV cache a token", justify="right")
    context = inspection.config.max_positions
    table.add_column(f"KV cache of {context:,} tokens", justify="right")
    for dtype in DTYPES:
        per_token = inspection.kv_bytes_per_token(dtype)
        table.add_row(
            str(dtype).removeprefix("torch."),
            _bytes(inspection.weight_bytes(dtype)),
            _bytes(per_token),
            _bytes(per_token * context),
        )
    return table


def _bytes(count: int) -> str:
    """Exact bytes and the next readable unit."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count:,} ({size:.1f} {unit})" if unit != "B" else f"{count:,}"
