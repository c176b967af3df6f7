"""Attention of one new token a sequence over its pages, split over the keys.

Reading the cache is all there is to do here, and one sequence's keys of one head are too few
readers for a whole GPU. So the keys are cut into splits (Flash-Decoding; Dao et al. 2023), each
read by a program of its own, and a second pass combines what they found. A split has a fixed
number of tokens counted from position 0: neither the batch nor the number of programs moves
its borders, and so they change no bit of a result. All query heads of a KV head share a program,
which reads the keys once for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from model.attention import causal_mask, scaled_dot_product
from model.kernels.gpu.tile import fold_tile

TILE = 64  # keys of one product
MIN_SPLIT = 256
MAX_SPLITS = 32
MIN_ROWS = 16  # of a product on tensor cores
# Programs that walk over splits: enough to fill a GPU several times over.
WANTED_PROGRAMS = 2048


@dataclass(frozen=True, slots=True)
class Splits:
    """How long sequences are cut: settled once for a model's longest context."""

    tokens: int
    count: int

    @classmethod
    def of(cls, max_model_len: int) -> Splits:
        """At most MAX_SPLITS of at least MIN_SPLIT tokens, whole tiles each."""
        tokens = max(MIN_SPLIT, -(-max_model_len // MAX_SPLITS // TILE) * TILE)
        return cls(tokens, -(-max_model_len // tokens))


# What changes from step to step must not make Triton compile a kernel anew.
@triton.jit(do_not_specialize=["table_stride"])
def _split_kernel(
    queries,
    keys,
    values,
    tables,
    table_stride,
    context_lens,
    query_rows,
    out,
    partial_out,
    partial_m,
    partial_l,
    num_heads,
    num_kv_heads,
    block_size,
    window,
    head_dim,
    scale,
    num_splits,
    split_tokens: tl.constexpr,
    is_whole: tl.constexpr,
    has_window: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
    width: tl.constexpr,
):
    seq, kv_head = tl.program_id(0), tl.program_id(1)
    num_keys = tl.load(context_lens + seq)
    query_row = tl.load(query_rows + seq).to(tl.int64)
    group = num_heads // num_kv_heads
    row, column = tl.arange(0, rows), tl.arange(0, width)
    head = kv_head * group + row
    inside = (row < group)[:, None] & (column < head_dim)[None, :]
    q_place = (query_row * num_heads + head)[:, None] * head_dim + column[None, :]
    q = tl.load(queries + q_place, mask=inside, other=0.0)
    position = tl.full((rows,), 0, tl.int32) + num_keys - 1
    table = tables + seq.to(tl.int64) * table_stride
    first_visible = 0
    if has_window:
        first_visible = tl.maximum(num_keys - window, 0)
    used = tl.minimum(tl.cdiv(num_keys, split_tokens), num_splits)
    if is_whole:
        used = 1  # of a padding row too, whose zeros somebody must write
    for split in range(tl.program_id(2), used, tl.num_programs(2)):
        start = split * split_tokens
        end = tl.minimum(num_keys, start + split_tokens)
        # Whole tiles are counted from position 0, with a window too.
        start = tl.maximum(start, first_visible // tile * tile)
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
        if is_whole:
            mixed = acc / tl.where(l == 0.0, 1.0, l)[:, None]  # a padding row sees nothing
            tl.store(out + q_place, mixed.to(out.dtype.element_ty), mask=inside)
        else:
            part = (seq.to(tl.int64) * num_heads + head) * num_splits + split
            tl.store(partial_m + part, m, mask=row < group)
            tl.store(partial_l + part, l, mask=row < group)
            tl.store(partial_out + part[:, None] * head_dim + column[None, :], acc, mask=inside)


@triton.jit
def _combine_kernel(
    partial_out,
    partial_m,
    partial_l,
    context_lens,
    query_rows,
    out,
    num_heads,
    head_dim,
    num_splits,
    split_tokens: tl.constexpr,
    width: tl.constexpr,
):
    seq, head = tl.program_id(0), tl.program_id(1)
    num_keys = tl.load(context_lens + seq)
    query_row = tl.load(query_rows + seq).to(tl.int64)
    column = tl.arange(0, width)
    inside = column < head_dim
    first = (seq.to(tl.int64) * num_heads + head) * num_splits
    used = tl.minimum(tl.cdiv(num_keys, split_tokens), num_splits)
    highest = -float("inf")
    for split in range(used):
        highest = tl.maximum(highest, tl.load(partial_m + first + split))
    total = 0.0
    acc = tl.zeros((width,), tl.float32)
    for split in range(used):  # one by one from position 0, always in this order
        factor = tl.exp(tl.load(partial_m + first + split) - highest)
        total += factor * tl.load(partial_l + first + split)
        place = (first + split) * head_dim + column
        acc += factor * tl.load(partial_out + place, mask=inside, other=0.0)
    mixed = acc / tl.where(total == 0.0, 1.0, total)
    place = (query_row * num_heads + head) * head_dim + column
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=inside)


def decode_attention(
    queries: Float[Tensor, "num_tokens num_heads head_dim"],
    keys: Float[Tensor, "num_blocks num_kv_heads head_dim block_size"],
    values: Float[Tensor, "num_blocks num_kv_heads block_size head_dim"],
    tables: Int[Tensor, "num_seqs max_blocks"],
    context_lens: Int[Tensor, " num_seqs"],
    query_rows: Int[Tensor, " num_seqs"],
    window: int | None,
    splits: Splits,
    out: Float[Tensor, "num_tokens num_heads head_dim"],
) -> None:
    """Fills the rows `query_rows` of `out`: what each sequence's last token gathers from its
    `context_lens` keys. A context of 0 gives zeros."""
    num_seqs, num_heads, head_dim = context_lens.shape[0], queries.shape[1], queries.shape[2]
    num_kv_heads, block_size = values.shape[1], values.shape[2]
    is_whole = splits.count == 1
    device = queries.device
    held = (num_seqs, num_heads, 1 if is_whole else splits.count)
    partial_out = torch.empty(*held, head_dim, dtype=torch.float32, device=device)
    partial_m = torch.empty(held, dtype=torch.float32, device=device)
    partial_l = torch.empty(held, dtype=torch.float32, device=device)
    width = max(16, triton.next_power_of_2(head_dim))
    programs = min(splits.count, max(1, WANTED_PROGRAMS // (num_seqs * num_kv_heads)))
    _split_kernel[(num_seqs, num_kv_heads, programs)](
        queries,
        keys,
        values,
        tables,
        tables.stride(0),
        context_lens,
        query_rows,
        out,
        partial_out,
        partial_m,
        partial_l,
        num_heads,
        num_kv_heads,
        block_size,
        window or 0,
        head_dim,
        1 / math.sqrt(head_dim),
        splits.count,
        split_tokens=splits.tokens,
        is_whole=is_whole,
        has_window=window is not None,
        rows=max(MIN_ROWS, triton.next_power_of_2(num_heads // num_kv_heads)),
        tile=TILE,
        width=width,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    if not is_whole:
        _combine_kernel[(num_seqs, num_heads)](
            partial_out,
            partial_m,
            partial_l,
            context_lens,
            query_rows,
            out,
            num_heads,
            head_dim,
            splits.count,
            split_tokens=splits.tokens,
            width=width,
            num_warps=2,
            enable_fp_fusion=True,
        )


def decode_attention_twin(
    queries: Float[Tensor, "num_tokens num_heads head_dim"],
    keys: Float[Tensor, "num_blocks num_kv_heads head_dim block_size"],
    values: Float[Tensor, "num_blocks num_kv_heads block_size head_dim"],
    tables: Int[Tensor, "num_seqs max_blocks"],
    context_lens: Int[Tensor, " num_seqs"],
    query_rows: Int[Tensor, " num_seqs"],
    window: int | None,
    _: Splits,
    out: Float[Tensor, "num_tokens num_heads head_dim"],
) -> None:
    """`decode_attention` in PyTorch: the equation, a sequence at a time."""
    for row, table, length in zip(query_rows.tolist(), tables, context_lens.tolist(), strict=True):
        out[row : row + 1] = attend_twin(
            queries[row : row + 1], keys, values, table, length, window
        )


def attend_twin(
    queries: Float[Tensor, "length num_heads head_dim"],
    keys: Float[Tensor, "num_blocks num_kv_heads head_dim block_size"],
    values: Float[Tensor, "num_blocks num_kv_heads block_size head_dim"],
    table: Int[Tensor, " max_blocks"],
    num_keys: int,
    window: int | None,
) -> Float[Tensor, "length num_heads head_dim"]:
    """softmax(Q K^T / sqrt(d)) V of one sequence's last `length` tokens, written out."""
    if num_keys == 0:
        return torch.zeros_like(queries)
    num_kv_heads, block_size = values.shape[1], values.shape[2]
    blocks = table[: -(-num_keys // block_size)].long()
    group = queries.shape[1] // num_kv_heads
    k, v = (
        pages.transpose(0, 1).flatten(1, 2)[:, :num_keys].float().repeat_interleave(group, dim=0)
        for pages in (keys[blocks].transpose(2, 3), values[blocks])
    )
    q = queries.transpose(0, 1).float()
    visible = causal_mask(q.shape[1], num_keys, window).to(q.device)
    mixed, _ = scaled_dot_product(q, k, v, visible)
    return mixed.transpose(0, 1).to(queries.dtype)
