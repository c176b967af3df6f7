"""Query/key norm, rotary positions and the write into the cache: all that lies between the
product that makes queries, keys and values and attention, in one pass.

Layout of the cache on a GPU. Keys lie as values do, a row of head_dim numbers for each token of a
block: the row is written here whole, and read by attention in whole lines of memory. The CPU's
layout (head_dim, block_size) would spread a token's key over head_dim lines, two bytes in each;
what it buys there, an operand that is transposed already, a tensor core has for nothing.
`KVCache.keys` keeps its shape, (..., head_dim, block_size): only the strides differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

HEADS = 8  # of one token, that one program takes


@triton.jit
def _rotary_write_kernel(
    qkv,
    query_weight,
    key_weight,
    cos_table,
    sin_table,
    positions,
    slots,
    queries,
    keys,
    values,
    num_heads,
    num_kv_heads,
    head_dim,
    block_size,
    eps,
    has_norm: tl.constexpr,
    has_rotary: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads + tl.arange(0, heads)[:, None]  # queries, keys, values
    column = tl.arange(0, width)[None, :]
    all_heads = num_heads + 2 * num_kv_heads
    inside = (head < all_heads) & (column < head_dim)
    is_query = head < num_heads
    is_value = head >= num_heads + num_kv_heads
    start = qkv + (token * all_heads + head) * head_dim
    plain = tl.load(start + column, mask=inside, other=0.0)
    x = plain.to(tl.float32)
    scale = tl.full((heads, 1), 1.0, tl.float32)
    if has_norm:
        mean = tl.sum(x * x, axis=1)[:, None] / head_dim
        scale = 1.0 / tl.sqrt(mean + eps)
        weight = tl.where(
            is_query,
            tl.load(query_weight + column, mask=column < head_dim, other=0.0).to(tl.float32),
            tl.load(key_weight + column, mask=column < head_dim, other=0.0).to(tl.float32),
        )
        x = x * scale * weight
    if has_rotary:  # x cos + rotate_half(x) sin, as model.positions.apply_rotary
        half = head_dim // 2
        partner = tl.where(column < half, column + half, column - half)
        other = tl.load(start + partner, mask=inside, other=0.0).to(tl.float32)
        if has_norm:
            weight = tl.where(
                is_query,
                tl.load(query_weight + partner, mask=column < head_dim, other=0.0).to(tl.float32),
                tl.load(key_weight + partner, mask=column < head_dim, other=0.0).to(tl.float32),
            )
            other = other * scale * weight
        other = tl.where(column < half, -other, other)
        angle = tl.load(positions + token).to(tl.int64) * head_dim + column
        cos = tl.load(cos_table + angle, mask=column < head_dim, other=0.0)
        sin = tl.load(sin_table + angle, mask=column < head_dim, other=0.0)
        x = x * cos + other * sin
    turned = x.to(queries.dtype.element_ty)
    tl.store(
        queries + (token * num_heads + head) * head_dim + column, turned, mask=inside & is_query
    )
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        block, offset = slot // block_size, slot % block_size
        kv_head = tl.where(is_value, head - num_heads - num_kv_heads, head - num_heads)
        place = ((block * num_kv_heads + kv_head) * block_size + offset) * head_dim + column
        tl.store(
            keys + place,
            turned.to(keys.dtype.element_ty),
            mask=inside & (head >= num_heads) & (is_value == 0),
        )
        tl.store(values + place, plain.to(values.dtype.element_ty), mask=inside & is_value)


def rotary_write(
    qkv: Float[Tensor, "num_tokens qkv_size"],
    norms: tuple[Float[Tensor, " head_dim"], Float[Tensor, " head_dim"], float] | None,
    tables: tuple[Float[Tensor, "max_positions head_dim"], ...] | None,
    positions: Int[Tensor, " num_tokens"],
    slots: Int[Tensor, " num_tokens"],
    keys: Float[Tensor, "num_blocks num_kv_heads head_dim block_size"],
    values: Float[Tensor, "num_blocks num_kv_heads block_size head_dim"],
) -> Float[Tensor, "num_tokens num_heads head_dim"]:
    """The queries, normed and turned; keys, likewise, and values go into one layer's cache, a
    token with slot -1 nowhere. `norms` is (query weight, key weight, epsilon), `tables` (cos,
    sin) in float32.

    Raises `ValueError` for a cache in the layout of the CPU.
    """
    _, num_kv_heads, block_size, head_dim = values.shape
    if keys.stride() != values.transpose(2, 3).stride():
        raise ValueError("the GPU's kernels want keys by token: KVCache.allocate(by_token=True)")
    num_tokens = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    queries = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    query_weight, key_weight, eps = norms or (qkv, qkv, 0.0)
    cos, sin = tables or (qkv, qkv)
    _rotary_write_kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS))](
        qkv,
        query_weight,
        key_weight,
        cos,
        sin,
        positions,
        slots,
        queries,
        keys,
        values,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        eps,
        has_norm=norms is not None,
        has_rotary=tables is not None,
        heads=HEADS,
        width=triton.next_power_of_2(head_dim),
        enable_fp_fusion=True,
    )
    return queries


def rotary_write_twin(
    qkv: Float[Tensor, "num_tokens qkv_size"],
    norms: tuple[Float[Tensor, " head_dim"], Float[Tensor, " head_dim"], float] | None,
    tables: tuple[Float[Tensor, "max_positions head_dim"], ...] | None,
    positions: Int[Tensor, " num_tokens"],
    slots: Int[Tensor, " num_tokens"],
    keys: Float[Tensor, "num_blocks num_kv_heads head_dim block_size"],
    values: Float[Tensor, "num_blocks num_kv_heads block_size head_dim"],
) -> Float[Tensor, "num_tokens num_heads head_dim"]:
    """`rotary_write` in PyTorch, for either layout of the cache."""
    _, num_kv_heads, block_size, head_dim = values.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    turned, plain = heads[:, :-num_kv_heads].float(), heads[:, -num_kv_heads:]
    num_heads = turned.shape[1] - num_kv_heads
    if norms is not None:
        query_weight, key_weight, eps = norms
        weights = torch.cat(
            (query_weight.expand(num_heads, -1), key_weight.expand(num_kv_heads, -1))
        )
        scale = torch.rsqrt(turned.square().mean(dim=-1, keepdim=True) + eps)
        turned = turned * scale * weights.float()
    if tables is not None:
        cos, sin = (table[positions][:, None] for table in tables)
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    turned = turned.to(qkv.dtype)
    real = slots >= 0
    blocks, offsets = slots[real] // block_size, slots[real] % block_size
    keys[blocks, :, :, offsets] = turned[real, num_heads:].to(keys.dtype)
    values[blocks, :, offsets] = plain[real].to(values.dtype)
    return turned[:, :num_heads]
