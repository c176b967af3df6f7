"""Attention of chunks of new tokens over pages, cached context included.

A program takes a tile of rows, which are the queries of one KV head, (query, head in its group)
flattened, and walks over the keys from position 0, or from the first one that a window lets any
of the rows see. A row's result depends neither on the tile's other rows nor on where in it the row
stands (`fold_tile`): in deterministic mode single tokens take this way too, so that a token's bits
are the same whether it was decoded or computed again as part of a prompt.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from model.kernels.gpu.decode import attend_twin
from model.kernels.gpu.tile import fold_tile

ROWS = 64  # of one product
# `tile` is keys of one product. Chosen by what the compiler makes of them (ahead.py): more would
# spill registers by the kilobyte, or not fit the shared memory of an A100.
HALF = {"tile": 64, "num_warps": 4, "num_stages": 2}
FLOAT32 = {"tile": 32, "num_warps": 8, "num_stages": 2}


def queries_per_tile(num_heads: int, num_kv_heads: int) -> int:
    """Tokens of one sequence that one program takes."""
    return max(1, ROWS // (num_heads // num_kv_heads))


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    queries,
    keys,
    values,
    tables,
    table_stride,
    query_start,
    context_lens,
    tile_seqs,
    tile_starts,
    out,
    num_heads,
    num_kv_heads,
    block_size,
    window,
    head_dim,
    scale,
    num_queries: tl.constexpr,
    has_window: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
    width: tl.constexpr,
):
    seq = tl.load(tile_seqs + tl.program_id(0))
    begin = tl.load(tile_starts + tl.program_id(0))
    kv_head = tl.program_id(1)
    num_keys = tl.load(context_lens + seq)
    first_row = tl.load(query_start + seq)
    length = tl.load(query_start + seq + 1) - first_row
    group = num_heads // num_kv_heads
    row, column = tl.arange(0, rows), tl.arange(0, width)
    query = begin + row // group
    is_row = (row < num_queries * group) & (query < length)
    # A row that is none stands before every key and sees nothing.
    position = tl.where(is_row, num_keys - length + query, -1)
    head = kv_head * group + row % group
    inside = is_row[:, None] & (column < head_dim)[None, :]
    place = ((first_row + query).to(tl.int64) * num_heads + head)[:, None] * head_dim
    place += column[None, :]
    q = tl.load(queries + place, mask=inside, other=0.0)
    table = tables + seq.to(tl.int64) * table_stride
    start = 0
    if has_window:
        first_visible = tl.maximum(num_keys - length + begin - window + 1, 0)
        start = first_visible // tile * tile
    end = tl.minimum(num_keys, num_keys - length + begin + num_queries)
    m = tl.full((rows,), -float("inf"), tl.float32)
    l = tl.zeros((rows,), tl.float32)
    acc = tl.zeros((rows, width), tl.float32)
    for first_key in range(start, end, tile):
        m, l, acc = fold_tile(
            m,
            l,
            acc,
            q,
            keys,
            values,
            table,
            first_key,
            num_keys,
            position,
            kv_head,
            num_kv_heads,
            block_size,
            window,
            head_dim,
            scale,
            has_window,
            tile,
            width,
        )
    mixed = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=inside)


def prefill_attention(
    queries: Float[Tensor, "num_tokens num_heads head_dim"],
    keys: Float[Tensor, "num_blocks num_kv_heads head_dim block_size"],
    values: Float[Tensor, "num_blocks num_kv_heads block_size head_dim"],
    tables: Int[Tensor, "num_seqs max_blocks"],
    query_start: Int[Tensor, " num_seqs_plus_1"],
    context_lens: Int[Tensor, " num_seqs"],
    tiles: tuple[Int[Tensor, " num_tiles"], Int[Tensor, " num_tiles"]],
    window: int | None,
    out: Float[Tensor, "num_tokens num_heads head_dim"],
) -> None:
    """Fills the rows of `out` that `tiles` name: (sequence, first of its tokens), each
    `queries_per_tile` tokens long."""
    num_heads, head_dim = queries.shape[1], queries.shape[2]
    num_kv_heads, block_size = values.shape[1], values.shape[2]
    group = num_heads // num_kv_heads
    _prefill_kernel[(tiles[0].shape[0], num_kv_heads)](
        queries,
        keys,
        values,
        tables,
        tables.stride(0),
        query_start,
        context_lens,
        *tiles,
        out,
        num_heads,
        num_kv_heads,
        block_size,
        window or 0,
        head_dim,
        1 / math.sqrt(head_dim),
        num_queries=queries_per_tile(num_heads, num_kv_heads),
        has_window=window is not None,
        rows=max(ROWS, triton.next_power_of_2(group)),
        width=max(16, triton.next_power_of_2(head_dim)),
        enable_fp_fusion=True,
        **(FLOAT32 if queries.dtype == torch.float32 else HALF),
    )


def prefill_attention_twin(
    queries: Float[Tensor, "num_tokens num_heads head_dim"],
    keys: Float[Tensor, "num_blocks num_kv_heads head_dim block_size"],
    values: Float[Tensor, "num_blocks num_kv_heads block_size head_dim"],
    tables: Int[Tensor, "num_seqs max_blocks"],
    query_start: Int[Tensor, " num_seqs_plus_1"],
    context_lens: Int[Tensor, " num_seqs"],
    tiles: tuple[Int[Tensor, " num_tiles"], Int[Tensor, " num_tiles"]],
    window: int | None,
    out: Float[Tensor, "num_tokens num_heads head_dim"],
) -> None:
    """`prefill_attention` in PyTorch: whole sequences, those that have a tile."""
    for seq in sorted(set(tiles[0].tolist())):
        begin, end = query_start[seq : seq + 2].tolist()
        out[begin:end] = attend_twin(
            queries[begin:end], keys, values, tables[seq], int(context_lens[seq]), window
        )
