"""One model over several GPUs of a node: every GPU has a part of each layer.

Products whose outputs are cut (query, key, value; gate, up) need nothing from the others; those
whose inputs are cut (out, down) give partial sums, added up by all (Shoeybi et al. 2019,
arXiv:1909.08053, section 3). Heads are cut whole, with the KV heads that they share, so that the
cache is cut too. The head gives each GPU a run of the vocabulary (the last run may end in rows of
zeros), put together before tokens are drawn; embeddings and norms are everywhere. So a layer has
two sums (model/exchange.py), and all GPUs draw the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import ConfigError, ModelConfig
from model.linear import Linear
from model.transformer import Transformer

HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Group:
    """Who computes together, and which of them this process is. `torch.distributed` must have
    been initialised with `size` processes."""

    rank: int
    size: int

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of everybody's numbers."""
        own = torch.tensor([number], dtype=torch.int64, device=device)
        dist.all_reduce(own, dist.ReduceOp.MIN)
        return int(own)


def part_config(config: ModelConfig, size: int) -> ModelConfig:
    """The numbers of one of `size` parts. Raises `ConfigError` for what cannot be cut evenly."""
    for name in ("num_kv_heads", "num_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise ConfigError(f"{name} {getattr(config, name)} cannot be cut into {size} parts")
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


def empty_part(config: ModelConfig, group: Group, max_positions: int | None) -> Transformer:
    """A transformer with fewer heads, a narrower MLP and a head for a run of the vocabulary, on
    the meta device."""
    with torch.device("meta"):
        part = Transformer(part_config(config, group.size), max_positions=max_positions)
        rows = -(-config.vocab_size // group.size)
        part.lm_head = Linear(config.hidden_size, rows, bias=False)
    return part


def cut(name: str, whole: Tensor, config: ModelConfig, group: Group) -> Tensor:
    """This process's part of a whole model's parameter; `config` is the whole model's."""
    *_, module, kind = name.split(".")
    if name == HEAD:
        rows = -(-config.vocab_size // group.size)
        mine = whole[group.rank * rows : (group.rank + 1) * rows]
        return torch.cat((mine, mine.new_zeros(rows - len(mine), whole.shape[1])))
    if module in ("out", "down"):  # inputs are cut
        if kind == "weight":
            return whole.chunk(group.size, dim=1)[group.rank].contiguous()
        return whole.clone() if group.rank == 0 else torch.zeros_like(whole)  # added once
    runs = {
        "qkv": [config.query_size, config.kv_size, config.kv_size],
        "gate_up": [config.intermediate_size] * 2,
        "up": [config.intermediate_size],
    }.get(module)
    if runs is None:
        return whole.clone()
    return torch.cat([run.chunk(group.size)[group.rank] for run in whole.split(runs)])


def put(model: nn.Module, name: str, parameter: Tensor) -> None:
    """Give a parameter of `model` its memory."""
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, nn.Parameter(parameter, requires_grad=False))


@torch.no_grad()
def part_of(model: Transformer, group: Group) -> Transformer:
    """This process's part of a whole model. Its weights are its own; the whole can go."""
    part = empty_part(model.config, group, model.max_positions)
    for name, whole in model.named_parameters(remove_duplicate=False):
        put(part, name, cut(name, whole, model.config, group))
    part.place_position_tables(model.embedding.weight.device)
    return part.eval()
