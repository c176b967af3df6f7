"""Attention over pages on the CPU, bitwise the same for a query in any company.

A query's result may depend on nothing but its own sequence: not on its neighbours in the
batch, not on whether it came alone, in a chunk or in a whole prompt. Three things see to
that (the trap is described in README.md, "The same tokens in any company"):

1. Every product has one shape: a multiple of `ROWS` query rows against one cache block
   (tile) of keys. Rows of such products do not depend on how many there are.
2. Tiles start at position 0, and their partial sums are added in that order, one by one.
3. The softmax is shifted by the true maximum, which no order of evaluation changes; a tile
   beyond a query's context adds exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.attention import SelfAttention
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.positions import RotaryPositions

# Rows of a product come in multiples of this: torch's float32 products on CPUs take other
# code paths for 1, 2, 3 leftover rows, with other bits.
ROWS = 4
# Queries of a chunk handled at once; bounds the memory for scores, changes no result.
MAX_QUERIES = 64


@dataclass(frozen=True, slots=True)
class CpuBackend:
    """Gathers the blocks of many sequences and multiplies them together."""

    config: ModelConfig
    cache: KVCache

    def begin(self, batch: ForwardBatch) -> _CpuStep:
        real = batch.query_start_host[-1]
        slots = batch.slot_mapping[:real]
        groups = tuple(_groups(batch, self.config, self.cache.block_size))
        return _CpuStep(
            self.config,
            self.cache,
            real,
            slots // self.cache.block_size,
            slots % self.cache.block_size,
            groups,
        )


@dataclass(frozen=True, slots=True)
class _Group:
    """Queries that are computed together: the decode tokens of many sequences, or up to
    MAX_QUERIES tokens of one sequence's chunk."""

    rows: slice | Int[Tensor, " num_seqs"]  # their rows in the batch, sequence after sequence
    num_seqs: int
    tables: Int[Tensor, "num_seqs num_tiles"]
    # For each distinct window: 0 where a query sees a key, -inf where not.
    masks: dict[int | None, Float[Tensor, "num_seqs num_tiles 1 queries 1 block_size"]]


def _groups(batch: ForwardBatch, config: ModelConfig, block_size: int) -> Iterator[_Group]:
    starts, contexts = batch.query_start_host, batch.context_lens_host
    windows = {config.window(layer) for layer in range(config.num_layers)}
    lengths = [starts[i + 1] - starts[i] for i in range(batch.num_seqs)]

    decodes = [i for i, length in enumerate(lengths) if length == 1]
    if decodes:
        rows = torch.tensor([starts[i] for i in decodes])
        last = torch.tensor([[contexts[i] - 1] for i in decodes])
        num_tiles = -(-max(contexts[i] for i in decodes) // block_size)
        tables = batch.block_tables[decodes, :num_tiles]
        yield _Group(rows, len(decodes), tables, _masks(last, num_tiles, block_size, windows))

    for i, length in enumerate(lengths):
        for begin in range(0, length if length > 1 else 0, MAX_QUERIES):
            count = min(MAX_QUERIES, length - begin)
            first = contexts[i] - length + begin
            positions = torch.arange(first, first + count)[None, :]
            num_tiles = -(-(first + count) // block_size)
            yield _Group(
                slice(starts[i] + begin, starts[i] + begin + count),
                1,
                batch.block_tables[i : i + 1, :num_tiles],
                _masks(positions, num_tiles, block_size, windows),
            )


def _masks(
    positions: Int[Tensor, "num_seqs queries"],
    num_tiles: int,
    block_size: int,
    windows: set[int | None],
) -> dict[int | None, Tensor]:
    key = torch.arange(num_tiles * block_size).view(1, num_tiles, 1, 1, 1, block_size)
    query = positions[:, None, None, :, None, None]
    masks = {}
    for window in windows:
        hidden = key > query
        if window is not None:
            hidden = hidden | (key <= query - window)
        masks[window] = torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)
    return masks


@dataclass(frozen=True, slots=True)
class _CpuStep:
    config: ModelConfig
    cache: KVCache
    num_real_tokens: int
    write_blocks: Int[Tensor, " num_real_tokens"]
    write_offsets: Int[Tensor, " num_real_tokens"]
    groups: tuple[_Group, ...]

    def __call__(
        self,
        attention: SelfAttention,
        qkv: Float[Tensor, "num_tokens qkv_size"],
        rotary: RotaryPositions | None,
    ) -> Float[Tensor, "num_tokens query_size"]:
        queries, keys, values = attention.heads(qkv, rotary)
        layer, real = attention.layer, self.num_real_tokens
        self.cache.write(layer, keys[:real], values[:real], self.write_blocks, self.write_offsets)
        scaled = queries.float() / math.sqrt(self.config.head_dim)
        out = torch.zeros_like(queries)
        window = self.config.window(layer)
        for group in self.groups:
            mixed = _attend(
                scaled[group.rows].unflatten(0, (group.num_seqs, -1)),
                self.cache.keys[layer][group.tables],
                self.cache.values[layer][group.tables],
                group.masks[window],
            )
            out[group.rows] = mixed.to(out.dtype)
        return out.flatten(1)


def _attend(
    queries: Float[Tensor, "num_seqs queries num_heads head_dim"],
    keys: Float[Tensor, "num_seqs num_tiles num_kv_heads head_dim block_size"],
    values: Float[Tensor, "num_seqs num_tiles num_kv_heads block_size head_dim"],
    mask: Float[Tensor, "num_seqs num_tiles 1 queries 1 block_size"],
) -> Float[Tensor, "num_seqs_x_queries num_heads head_dim"]:
    """softmax(Q K^T) V over tiles, the queries already scaled."""
    num_seqs, num_queries, num_heads, head_dim = queries.shape
    num_tiles, num_kv_heads, block_size = values.shape[1:4]
    group = num_heads // num_kv_heads
    num_rows = num_queries * group
    padded = -(-num_rows // ROWS) * ROWS

    # Rows of a product: all queries of one KV head, (query, head in group) flattened.
    rows = queries.new_zeros(num_seqs, 1, num_kv_heads, padded, head_dim)
    rows[:, 0, :, :num_rows].unflatten(2, (num_queries, group)).copy_(
        queries.unflatten(2, (num_kv_heads, group)).permute(0, 2, 1, 3, 4)
    )
    rows = rows.expand(-1, num_tiles, -1, -1, -1).reshape(-1, padded, head_dim)

    scores = torch.bmm(rows, keys.reshape(-1, head_dim, block_size).float())
    scores = scores.view(num_seqs, num_tiles, num_kv_heads, padded, block_size)
    scores[:, :, :, :num_rows].unflatten(3, (num_queries, group)).add_(mask)
    highest = scores.amax(dim=(1, 4), keepdim=True)
    weights = scores.sub_(highest).exp_()
    tile_sums = weights.sum(dim=-1, keepdim=True)
    tile_outs = torch.bmm(
        weights.view(-1, padded, block_size), values.reshape(-1, block_size, head_dim).float()
    ).view(num_seqs, num_tiles, num_kv_heads, padded, head_dim)

    total, out = tile_sums[:, 0], tile_outs[:, 0]
    for tile in range(1, num_tiles):
        total = total + tile_sums[:, tile]
        out = out + tile_outs[:, tile]
    out = (out / total)[:, :, :num_rows].unflatten(2, (num_queries, group))
    by_query: Tensor = out.permute(0, 2, 1, 3, 4)
    return by_query.reshape(-1, num_heads, head_dim)
