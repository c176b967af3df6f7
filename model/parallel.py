"""One model over several GPUs of a node: every GPU has a part of each layer.

Products whose outputs are cut (query, key, value; gate, up) need nothing from the others; those
whose inputs are cut (out, down) give partial sums, added up by all (Shoeybi et al. 2019,
arXiv:1909.08053, section 3). Heads are cut whole, with the KV heads that they share, so that the
cache is cut too. The head gives each GPU a run of the vocabulary, put together before tokens are
drawn; embeddings and norms are everywhere. So a layer has two sums, and all GPUs draw the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from model.config import ConfigError, ModelConfig
from model.layers import GeluMLP, SwiGLUMLP
from model.linear import Linear
from model.transformer import Block, Transformer


@dataclass(frozen=True, slots=True)
class Group:
    """Who computes together, and which of them this process is. `torch.distributed` must have
    been initialised with `size` processes."""

    rank: int
    size: int

    def add_up(self, partial: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The sum of everybody's `partial`, in its place."""
        dist.all_reduce(partial)
        return partial

    def put_together(self, part: Float[Tensor, "rows part"]) -> Float[Tensor, "rows vocab_size"]:
        """Everybody's runs of the vocabulary, side by side."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim=-1)


def part_config(config: ModelConfig, size: int) -> ModelConfig:
    """The numbers of one of `size` parts. Raises `ConfigError` for what cannot be cut evenly."""
    for name in ("num_kv_heads", "num_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % size:
            raise ConfigError(f"{name} {getattr(config, name)} cannot be cut into {size} parts")
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


@torch.no_grad()
def part_of(model: Transformer, group: Group) -> Transformer:
    """This process's part of a whole model: a transformer with fewer heads, a narrower MLP and a
    head for a run of the vocabulary. Its weights are its own; the whole can go."""
    config = part_config(model.config, group.size)
    embedding = model.embedding.weight
    with torch.device("meta"):
        part = Transformer(config, max_positions=model.max_positions)
    part.to(embedding.dtype).to_empty(device=embedding.device)
    part.place_position_tables(embedding.device)
    for ours, whole in zip(part.blocks, model.blocks, strict=True):
        _fill_block(ours, whole, config, group)
    part.embedding.weight.copy_(embedding)
    if part.position_embedding is not None and model.position_embedding is not None:
        part.position_embedding.weight.copy_(model.position_embedding.weight)
    part.final_norm.load_state_dict(model.final_norm.state_dict())
    head = Linear(config.hidden_size, config.vocab_size // group.size, bias=False)
    head.weight = nn.Parameter(_run(model.lm_head.weight, group).clone())
    part.lm_head = head
    return part.eval().requires_grad_(False)


def _fill_block(ours: nn.Module, whole: nn.Module, config: ModelConfig, group: Group) -> None:
    if not isinstance(ours, Block) or not isinstance(whole, Block):
        raise TypeError(f"a transformer of {type(whole).__name__}")
    for name in ("attention_norm", "mlp_norm"):
        getattr(ours, name).load_state_dict(getattr(whole, name).state_dict())
    for name in ("query_norm", "key_norm"):
        if (norm := getattr(whole.attention, name)) is not None:
            getattr(ours.attention, name).load_state_dict(norm.state_dict())
    sizes = (config.query_size, config.kv_size, config.kv_size)
    _fill_outputs(ours.attention.qkv, whole.attention.qkv, sizes, group)
    _fill_inputs(ours.attention.out, whole.attention.out, group)
    width = config.intermediate_size
    if isinstance(ours.mlp, SwiGLUMLP) and isinstance(whole.mlp, SwiGLUMLP):
        _fill_outputs(ours.mlp.gate_up, whole.mlp.gate_up, (width, width), group)
        _fill_inputs(ours.mlp.down, whole.mlp.down, group)
    elif isinstance(ours.mlp, GeluMLP) and isinstance(whole.mlp, GeluMLP):
        _fill_outputs(ours.mlp.up, whole.mlp.up, (width,), group)
        _fill_inputs(ours.mlp.down, whole.mlp.down, group)
    else:
        raise TypeError(f"an MLP of {type(whole.mlp).__name__}")


def _fill_outputs(ours: Linear, whole: Linear, sizes: tuple[int, ...], group: Group) -> None:
    """`sizes` of the parts' runs of outputs, such as queries, keys and values."""
    runs = [size * group.size for size in sizes]
    for mine, theirs in ((ours.weight, whole.weight), (ours.bias, whole.bias)):
        if mine is not None and theirs is not None:
            mine.copy_(torch.cat([_run(part, group) for part in theirs.split(runs)]))


def _fill_inputs(ours: Linear, whole: Linear, group: Group) -> None:
    ours.weight.copy_(whole.weight.chunk(group.size, dim=1)[group.rank])
    if ours.bias is not None and whole.bias is not None:  # added once, by the first
        ours.bias.copy_(whole.bias if group.rank == 0 else torch.zeros_like(whole.bias))


def _run(rows: Tensor, group: Group) -> Tensor:
    return rows.chunk(group.size)[group.rank]
