"""Noise that is a function: (seed, position, token id) -> one Gumbel number.

There is no generator and no state. A sequence that was preempted, moved, resumed after a
crash or drawn beside other sequences gets the same noise for the same token at the same
place, because nothing else enters the formula (architecture.md, law 4).

Adding Gumbel noise to logits and taking the largest draws from their softmax (Gumbel 1954;
Maddison et al. 2014, arXiv:1411.0030):

    argmax_v (logit[v] / T + G[v]),   G = -log(-log u),   u uniform in (0, 1)

The algorithm, complete, for whoever writes it again in a kernel. All of it is arithmetic
modulo 2^32; `>>` shifts zeros in; `mix` is lowbias32 (Chris Wellons, "Prospecting for Hash
Functions", 2018, nullprogram.com/blog/2018/07/31), the shape of murmur3's finaliser with
constants of less bias:

    mix(x):        x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16

    per seed       low, high = seed & 0xffffffff, seed >> 32
                   a = mix(mix(low + 0x9e3779b9) ^ high)
                   b = mix(mix(high + 0x85ebca6b) ^ low)
    per row        k0, k1 = mix(a ^ position), mix(b ^ position)
    per token id   t = mix(id + 0x9e3779b9)
    per element    x = mix(t ^ k0), with x ^= k1 between its second shift and second product
                   n = x & 0x7fffffff
                   s = (n + 1/2) / 2^31        uniform, 2^-32 <= s <= 1 - 2^-32
                   G = -log(-log1p(-s))        the Gumbel of u = 1 - s; -3.10 < G < 22.19

(0x9e3779b9 is 2^32 over the golden ratio, 0x85ebca6b a constant of murmur3; they only keep
seed 0 and token 0 away from mix's fixed point 0.) The positions of one seed have different
k0 and different k1, since mix is one-to-one; two seeds share both keys with chance 2^-64.

Why s and not u: a token is drawn because its G is large, which is u close to 1, where
float32 knows u in steps of 2^-24 and no G beyond 17. s = 1 - u is small there, known to
full relative precision, and log1p keeps it. Here G is float64 (7 ns an element on
one CPU thread), so that scores are ordered alike on every device and no two tie; in
float32 the same numbers are -log(-log1p(-s)) for n < 2^30 and -log(-log((m + 1/2) / 2^31)),
m = 2^31 - 1 - n, above. `gumbel_argmax` avoids nearly all of those logarithms on the CPU.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

MAX_SEED = 2**63 - 1
_MASK = 0xFFFFFFFF
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B
_GOLDEN = 0x9E3779B9
_MURMUR = 0x85EBCA6B

# Elements of (rows, vocab) hashed at a time on the CPU: two such arrays, 1 MiB each, stay
# in its cache.
_CHUNK_ELEMENTS = 2**18


def seed_words(seed: int) -> tuple[int, int]:
    """The words (a, b) of a seed, as signed 32-bit numbers.

    Raises `ValueError` for a seed outside 0 .. 2^63 - 1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be between 0 and {MAX_SEED}, got {seed}")
    return _seed_words(seed)


@lru_cache(maxsize=4096)
def _seed_words(seed: int) -> tuple[int, int]:
    low, high = seed & _MASK, seed >> 32
    a = _mix_int(_mix_int((low + _GOLDEN) & _MASK) ^ high)
    b = _mix_int(_mix_int((high + _MURMUR) & _MASK) ^ low)
    return _signed(a), _signed(b)


def row_keys(
    words: Int[Tensor, "rows 2"], positions: Int[Tensor, " rows"]
) -> Int[Tensor, "rows 2"]:
    """(k0, k1) of each row, int32: `words` are its seed's, int32; `positions` (int32) say
    where in its sequence the drawn token will stand, the prompt's first token being 0."""
    return _mix_(words ^ positions[:, None])


@lru_cache(maxsize=8)
def token_words(vocab_size: int, device: torch.device) -> Int[Tensor, " vocab_size"]:
    """t of every token id, int32; computed once for a vocabulary and device. Read only."""
    ids = torch.arange(vocab_size, dtype=torch.int32, device=device)
    return _mix_(ids + _signed(_GOLDEN))


def noise_bits(
    keys: Int[Tensor, "rows 2"], words: Int[Tensor, "#rows tokens"]
) -> Int[Tensor, "rows tokens"]:
    """n for each row and token: 31 uniform bits, int32. `words` are `token_words`, one row
    for all or one for each."""
    return _mix_(words ^ keys[:, :1], keys[:, 1:]).bitwise_and_(0x7FFFFFFF)


def gumbel(
    keys: Int[Tensor, "rows 2"], words: Int[Tensor, "#rows tokens"]
) -> Float[Tensor, "rows tokens"]:
    """G for each row and token, float64."""
    return _gumbel_of_bits(noise_bits(keys, words))


def gumbel_argmax(
    scores: Float[Tensor, "rows vocab_size"], keys: Int[Tensor, "rows 2"]
) -> Int[Tensor, " rows"]:
    """The token of the largest `scores` + G in each row, lowest id first, int64.

    `scores` is float32, contiguous, and each row's largest is finite; -inf is never drawn.
    The sum is taken in float64.
    """
    words = token_words(scores.shape[1], scores.device)
    if scores.device.type != "cpu":
        return (gumbel(keys, words[None]) + scores).argmax(dim=-1)
    return torch.from_numpy(
        _argmax_by_bound(
            scores.numpy(), keys.numpy().view(np.uint32), words.numpy().view(np.uint32)
        )
    )


# G is never above -log s (as -log(1 - s) >= s), and read as an integer the bits of a float32
# f > 0 give, scaled, a logarithm that is never above log2 f and at most 0.0861 under it
# (Mitchell 1962). So _LOG_OFFSET + _LOG_SLOPE * bits(float(n)) is never below G. The slack
# covers the roundings of float32, under 1e-4 for any score that can still win.
_LOG_SLOPE = np.float32(-math.log(2) / 2**23)
_LOG_OFFSET = math.log(2) * (31 + 127)
_SLACK = 1e-3


def _argmax_by_bound(
    scores: NDArray[np.float32], keys: NDArray[np.uint32], words: NDArray[np.uint32]
) -> NDArray[np.int64]:
    """The same answer as the dense sum, with logarithms of a handful of elements: only
    tokens whose cheap upper bound reaches the true score of one good token can win.

    NumPy, because on one CPU thread its uint32 arithmetic, argmax and comparison take a
    half to a fifth of torch's time. Each buffer is used for several things in turn.
    """
    num_rows, vocab_size = scores.shape
    step = min(num_rows, max(1, _CHUNK_ELEMENTS // vocab_size))
    hashes = np.empty((step, vocab_size), np.uint32)
    scratch = np.empty((step, vocab_size), np.uint32)
    token_ids = np.empty(num_rows, np.int64)
    for start in range(0, num_rows, step):
        chunk = slice(start, min(start + step, num_rows))
        size = chunk.stop - start
        n, bound = hashes[:size], scratch[:size].view(np.float32)
        _noise_bits_numpy(keys[chunk], words, n, scratch[:size])
        np.copyto(bound, n.view(np.int32))  # float(n)
        np.copyto(bound, bound.view(np.int32))  # its bits, as a number
        np.multiply(bound, _LOG_SLOPE, out=bound)
        np.add(bound, scores[chunk], out=bound)
        promising = bound.argmax(axis=1) + np.arange(size) * vocab_size
        enough = _scores_at(scores[chunk], n, promising) - (_LOG_OFFSET + _SLACK)
        candidates = np.flatnonzero(bound >= enough.astype(np.float32)[:, None])
        rows, columns = np.divmod(candidates, vocab_size)
        order = np.lexsort((columns, -_scores_at(scores[chunk], n, candidates), rows))
        token_ids[chunk] = columns[order[np.searchsorted(rows, np.arange(size))]]
    return token_ids


def _noise_bits_numpy(
    keys: NDArray[np.uint32],
    words: NDArray[np.uint32],
    n: NDArray[np.uint32],
    scratch: NDArray[np.uint32],
) -> None:
    """`noise_bits` into `n`; twin of the torch one, without its detour around the sign."""
    np.bitwise_xor(words, keys[:, :1], out=n)
    np.bitwise_xor(n, np.right_shift(n, 16, out=scratch), out=n)
    np.multiply(n, np.uint32(_MULTIPLIER_1), out=n)
    np.bitwise_xor(n, np.right_shift(n, 15, out=scratch), out=n)
    np.bitwise_xor(n, keys[:, 1:], out=n)
    np.multiply(n, np.uint32(_MULTIPLIER_2), out=n)
    np.bitwise_xor(n, np.right_shift(n, 16, out=scratch), out=n)
    np.bitwise_and(n, np.uint32(0x7FFFFFFF), out=n)


def _scores_at(
    scores: NDArray[np.float32], n: NDArray[np.uint32], flat: NDArray[np.int64]
) -> NDArray[np.float64]:
    """scores + G in float64 at flat indices into both."""
    s = (n.take(flat) + 0.5) * 2.0**-31
    summed: NDArray[np.float64] = scores.take(flat) - np.log(-np.log1p(-s))
    return summed


def _gumbel_of_bits(bits: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    s = bits.to(torch.float64).add_(0.5).mul_(2.0**-31)
    return s.neg_().log1p_().neg_().log_().neg_()


def _mix_(x: Int[Tensor, "*shape"], key: Tensor | None = None) -> Int[Tensor, "*shape"]:
    """mix, in place on int32; `key` goes in between its second shift and second product."""
    shifted = torch.empty_like(x)
    _xor_shift_(x, 16, shifted)
    x.mul_(_MULTIPLIER_1)
    _xor_shift_(x, 15, shifted)
    if key is not None:
        x.bitwise_xor_(key)
    x.mul_(_signed(_MULTIPLIER_2))
    _xor_shift_(x, 16, shifted)
    return x


def _xor_shift_(x: Tensor, bits: int, shifted: Tensor) -> None:
    """x ^= x >> bits. torch shifts the sign in (and has no shift for uint32): mask it off."""
    torch.bitwise_right_shift(x, bits, out=shifted)
    x.bitwise_xor_(shifted.bitwise_and_(_MASK >> bits))


def _mix_int(x: int) -> int:
    """mix, on a Python integer of 0 .. 2^32 - 1."""
    x ^= x >> 16
    x = x * _MULTIPLIER_1 & _MASK
    x ^= x >> 15
    x = x * _MULTIPLIER_2 & _MASK
    return x ^ x >> 16


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    return word - 2**32 if word >= 2**31 else word
