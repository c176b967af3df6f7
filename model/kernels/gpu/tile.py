"""One tile of keys, folded into a running softmax: the step that both attention kernels repeat.

The running state of a row is (m, l, acc): the largest score so far, the sum of exp(score - m),
and the values weighted likewise (Milakov and Gimelshein 2018, arXiv:1805.02867). A tile in which a
row sees nothing leaves its state as it was, to the bit, so that the other rows of a product and
the tiles they need change nothing for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# NumPy, which the interpreter computes with, has no bfloat16: there its products take float32.
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32. A float32 operand is cut into two of TF32, whose products come close to
    float32's (Ootomo and Yokota 2022, arXiv:2203.03341): without tensor cores, the operands of
    these tiles would take a thousand registers a thread."""
    if IS_INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def fold_tile(
    m,
    l,
    acc,
    queries,
    keys,
    values,
    table,
    first_key,
    num_keys,
    row_position,
    kv_head,
    num_kv_heads,
    block_size,
    window,
    head_dim,
    scale,
    has_window: tl.constexpr,
    tile: tl.constexpr,
    width: tl.constexpr,
):
    """Keys first_key .. first_key + tile of the sequence whose blocks `table` names; a row at
    `row_position` sees those up to its own, the latest `window` of them."""
    key = first_key + tl.arange(0, tile)
    exists = key < num_keys
    block = tl.load(table + key // block_size, mask=exists, other=0).to(tl.int64)
    place = ((block * num_kv_heads + kv_head) * block_size + key % block_size) * head_dim
    column = tl.arange(0, width)
    inside = exists[:, None] & (column < head_dim)[None, :]
    k = tl.load(keys + place[:, None] + column[None, :], mask=inside, other=0.0)
    scores = dot(queries, tl.trans(k), tl.zeros((queries.shape[0], tile), tl.float32)) * scale
    visible = exists[None, :] & (key[None, :] <= row_position[:, None])
    if has_window:
        visible = visible & (key[None, :] > row_position[:, None] - window)
    scores = tl.where(visible, scores, -float("inf"))
    highest = tl.maximum(m, tl.max(scores, axis=1))
    shift = tl.where(highest == -float("inf"), 0.0, highest)  # nothing seen yet: exp(-inf) = 0
    weights = tl.exp(scores - shift[:, None])
    keep = tl.exp(m - shift)
    v = tl.load(values + place[:, None] + column[None, :], mask=inside, other=0.0)
    acc = dot(weights.to(v.dtype), v, acc * keep[:, None])
    return highest, l * keep + tl.sum(weights, axis=1), acc
