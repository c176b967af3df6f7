"""A token for each row of logits without leaving the GPU: temperature, top-k, top-p, min-p and
Gumbel noise, as model/sampling.py says, with the noise of model/noise.py to the bit.

One program a row; nothing is sorted. In the order (value, descending; id, ascending):

    top_k   keeps a prefix. Its border is found by bisection over the values, as integers that are
            ordered like them, and among equal values over ids.
    top_p   keeps a prefix too. A token is drawn from all; if those ahead of it hold top_p already
            it lies outside, and so does all that comes after it: draw again from those ahead. What
            is drawn in the end is the argmax over the nucleus (`_draw_top_p`, model/sampling.py).
    noise   is a logarithm of a logarithm in float64. -log s is never below it and costs a
            float32 logarithm, so that only chunks whose bound reaches the best so far are computed
            in full: a handful.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from model.noise import gumbel, row_keys, token_words

CHUNK = 4096  # logits at a time
_LARGEST = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class DrawRows:
    """What each row asks for. `seats` says where its token goes in `last_tokens`."""

    inverse_temperature: Float[Tensor, " rows"]  # 0: the largest logit, no noise
    top_k: Int[Tensor, " rows"]  # 0: off
    top_p: Float[Tensor, " rows"]  # 1 or more: off
    min_p: Float[Tensor, " rows"]  # its logarithm; the lowest float32: off
    seeds: Int[Tensor, "2 rows"]  # model.noise.seed_words
    positions: Int[Tensor, " rows"]  # of the token to be drawn
    seats: Int[Tensor, " rows"]


@triton.jit
def _mix(x, key):
    """model.noise.mix; `key` goes in between its second shift and second product."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x ^= key
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _bits(token, key0, key1):
    """31 uniform bits for each token id: n of model/noise.py."""
    zero = tl.zeros_like(key0)
    word = _mix(token.to(tl.uint32) + 0x9E3779B9, zero)
    return _mix(word ^ key0, key1) & 0x7FFFFFFF


@triton.jit
def _ordered(value):
    """Integers ordered as the float32 values are; adding 0 turns -0 into 0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scaled(line, start, vocab_size, peak, inverse_temperature, chunk: tl.constexpr):
    """(ids, scaled logits) of a chunk; past the vocabulary -inf, which nothing keeps."""
    token = start + tl.arange(0, chunk)
    logit = tl.load(line + token, mask=token < vocab_size, other=-float("inf"))
    return token, (logit - peak) * inverse_temperature


@triton.jit
def _count(
    line, vocab_size, peak, inverse, key, max_id, is_exact: tl.constexpr, chunk: tl.constexpr
):
    """How many tokens are at least `key`; or exactly `key` with an id of at most `max_id`."""
    total = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, chunk):
        token, value = _scaled(line, start, vocab_size, peak, inverse, chunk)
        order = _ordered(value)
        hit = order >= key
        if is_exact:
            hit = (order == key) & (token <= max_id)
        total += tl.sum((hit & (token < vocab_size)).to(tl.int32), axis=0)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _draw_kernel(
    logits,
    inverse_temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    seats,
    token_ids,
    peaks,
    last_tokens,
    num_rows,
    vocab_size,
    chunk: tl.constexpr,
):
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * vocab_size
    inverse = tl.load(inverse_temperatures + row)
    peak = tl.full((), -float("inf"), tl.float32)
    chosen = tl.full((), 0, tl.int32)
    num_nan = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, chunk):
        token = start + tl.arange(0, chunk)
        logit = tl.load(line + token, mask=token < vocab_size, other=-float("inf"))
        num_nan += tl.sum((logit != logit).to(tl.int32), axis=0)
        highest = tl.max(logit, axis=0)
        if highest > peak:
            peak = highest
            chosen = tl.min(tl.where(logit == highest, token, vocab_size), axis=0)
    is_bad = (num_nan > 0) | (peak == float("inf")) | (peak == -float("inf"))
    if (inverse > 0.0) & (is_bad == 0):
        top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
        floor = tl.load(min_ps + row)
        position = tl.load(positions + row).to(tl.uint32)
        zero = tl.zeros_like(position)
        key0 = _mix(tl.load(seeds + row).to(tl.uint32) ^ position, zero)
        key1 = _mix(tl.load(seeds + num_rows + row).to(tl.uint32) ^ position, zero)

        # The border of top_k: tokens above `cut`, and those equal to it up to id `cut_id`.
        cut = tl.full((), -2147483648, tl.int64)
        cut_id = tl.full((), 0, tl.int64) + vocab_size
        if (top_k > 0) & (top_k < vocab_size):
            beyond = tl.full((), 1, tl.int64)  # the order of 0, the largest there is, and 1
            at_least = tl.full((), 0, tl.int32) + vocab_size
            while (beyond - cut > 1) & (at_least != top_k):
                middle = (cut + beyond) >> 1
                count = _count(line, vocab_size, peak, inverse, middle, 0, False, chunk)
                if count >= top_k:
                    cut = middle
                    at_least = count
                else:
                    beyond = middle
            if at_least > top_k:
                equal = _count(line, vocab_size, peak, inverse, cut, vocab_size, True, chunk)
                wanted = equal - (at_least - top_k)
                low = tl.full((), -1, tl.int64)
                while cut_id - low > 1:
                    middle = (low + cut_id) >> 1
                    if _count(line, vocab_size, peak, inverse, cut, middle, True, chunk) >= wanted:
                        cut_id = middle
                    else:
                        low = middle

        total = tl.full((), 0.0, tl.float64)
        if top_p < 1.0:
            for start in range(0, vocab_size, chunk):
                token, value = _scaled(line, start, vocab_size, peak, inverse, chunk)
                order = _ordered(value)
                kept = (order > cut) | ((order == cut) & (token <= cut_id))
                total += tl.sum(tl.where(kept, tl.exp(value), 0.0), axis=0).to(tl.float64)

        limit = tl.full((), -2147483649, tl.int64)  # candidates come before it; nothing is after
        limit_id = tl.full((), 0, tl.int32)
        is_drawing = tl.full((), 1, tl.int32)
        while is_drawing != 0:
            best = tl.full((), -float("inf"), tl.float64)
            best_order = tl.full((), 0, tl.int64)
            for start in range(0, vocab_size, chunk):
                token, value = _scaled(line, start, vocab_size, peak, inverse, chunk)
                order = _ordered(value)
                kept = (order > cut) | ((order == cut) & (token <= cut_id))
                kept = kept & ((order > limit) | ((order == limit) & (token < limit_id)))
                kept = kept & (value >= floor) & (value > -float("inf"))
                bits = _bits(token, key0, key1)
                s = (bits.to(tl.float32) + 0.5) * 4.656612873077393e-10
                bound = tl.where(kept, value - tl.log(s) + 1e-3, -float("inf"))
                if tl.max(bound, axis=0).to(tl.float64) >= best:
                    exact_s = (bits.to(tl.float64) + 0.5) * 4.656612873077393e-10
                    noise = -tl.log(-tl.log(1.0 - exact_s))  # 1 - s is exact
                    score = tl.where(kept, value.to(tl.float64) + noise, -float("inf"))
                    highest = tl.max(score, axis=0)
                    if highest > best:
                        best = highest
                        chosen = tl.min(tl.where(score == highest, token, vocab_size), axis=0)
                        is_it = token == chosen
                        best_order = tl.sum(tl.where(is_it, order, 0), axis=0).to(tl.int64)
            is_drawing = tl.full((), 0, tl.int32)
            if top_p < 1.0:
                ahead = tl.full((), 0.0, tl.float64)
                for start in range(0, vocab_size, chunk):
                    token, value = _scaled(line, start, vocab_size, peak, inverse, chunk)
                    order = _ordered(value)
                    is_ahead = (order > best_order) | ((order == best_order) & (token < chosen))
                    ahead += tl.sum(tl.where(is_ahead, tl.exp(value), 0.0), axis=0).to(tl.float64)
                if ahead >= top_p.to(tl.float64) * total:
                    limit = best_order
                    limit_id = chosen
                    is_drawing = tl.full((), 1, tl.int32)
    if is_bad:
        chosen = tl.full((), 0, tl.int32)
        peak = tl.where(num_nan > 0, float("nan"), peak)
    tl.store(token_ids + row, chosen)
    tl.store(peaks + row, peak)
    tl.store(last_tokens + tl.load(seats + row), chosen)


def draw(
    logits: Float[Tensor, "rows vocab_size"],
    rows: DrawRows,
    last_tokens: Int[Tensor, " num_seats"],
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """(token ids, each row's largest logit), the ids put into `last_tokens` too, all int32.
    A row whose largest logit is not finite (NaN counts as larger than anything) gets token 0."""
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    peaks = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _draw_kernel[(num_rows,)](
        logits,
        rows.inverse_temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        rows.seeds,
        rows.positions,
        rows.seats,
        token_ids,
        peaks,
        last_tokens,
        num_rows,
        vocab_size,
        chunk=min(CHUNK, triton.next_power_of_2(vocab_size)),
        num_warps=8,
        enable_fp_fusion=False,  # the noise has the CPU's bits
    )
    return token_ids, peaks


def draw_twin(
    logits: Float[Tensor, "rows vocab_size"],
    rows: DrawRows,
    last_tokens: Int[Tensor, " num_seats"],
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """`draw` in PyTorch, a sorted row at a time."""
    token_ids = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
    peaks = logits.amax(dim=-1)
    keys = row_keys(rows.seeds.t().contiguous(), rows.positions)
    words = token_words(logits.shape[1], logits.device)
    for row, line in enumerate(logits):
        if not bool(peaks[row].isfinite()):
            continue
        if rows.inverse_temperature[row] == 0:
            token_ids[row] = line.argmax()
            continue
        scaled = (line - peaks[row]) * rows.inverse_temperature[row]
        order = torch.sort(scaled, descending=True, stable=True).indices
        k, p = int(rows.top_k[row]), float(rows.top_p[row])
        order = order[: k if 0 < k < len(line) else len(line)]
        if p < 1.0:
            weights = scaled[order].exp().double()
            before = weights.cumsum(0) - weights
            order = order[before < p * weights.sum()]
        order = order[(scaled[order] >= rows.min_p[row]) & (scaled[order] > -math.inf)]
        scores = gumbel(keys[row : row + 1], words[order][None])[0] + scaled[order]
        token_ids[row] = order[scores.argmax()]
    last_tokens[rows.seats] = token_ids
    return token_ids, peaks
