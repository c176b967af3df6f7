"""Which tokens may be drawn: top-k, top-p and min-p, without sorting the vocabulary.

Everything here treats each row by itself and orders tokens by (value, descending; id,
ascending), a total order, so that neither ties nor other rows can change what is kept.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

# Blocks whose maxima are ranked first when few of many tokens are wanted.
_BLOCK = 32
_ID_BITS = 32
_ID_MASK = 2**_ID_BITS - 1


def largest(values: Float[Tensor, "rows vocab_size"], count: int) -> Int[Tensor, "rows count"]:
    """Ids of the `count` largest values of each row, in order; of equal ones the lowest id
    comes first."""
    vocab_size = values.shape[1]
    if 2 * count * _BLOCK > vocab_size:
        return _ordered(values, count)
    # The `count` largest lie in the `count` blocks with the largest maxima (or the rest
    # that fills no block). Blocks are runs of ids, so a tie falls to the lower block.
    whole = vocab_size // _BLOCK * _BLOCK
    peaks = values[:, :whole].unflatten(1, (-1, _BLOCK)).amax(dim=-1)
    blocks = _ordered(peaks, count)
    within = torch.arange(_BLOCK, device=values.device)
    columns = (blocks[:, :, None] * _BLOCK + within).flatten(1)
    if whole != vocab_size:
        rest = torch.arange(whole, vocab_size, device=values.device)
        columns = torch.cat((columns, rest.expand(values.shape[0], -1)), dim=1)
    return _ordered(values.gather(1, columns), count, columns)


def _ordered(
    values: Float[Tensor, "rows tokens"],
    count: int,
    ids: Int[Tensor, "rows tokens"] | None = None,
) -> Int[Tensor, "rows count"]:
    """`largest` by one key that holds value and id: no two are equal, so that the order a
    sort leaves equal keys in does not matter."""
    if ids is None:
        ids = torch.arange(values.shape[1], device=values.device)
    # The bits of a float32, read as an integer, order positive numbers as the numbers are
    # ordered, and negative ones backwards. Adding 0 turns -0 into 0.
    bits = (values + 0.0).view(torch.int32)
    ascending = bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)
    keys = (ascending.to(torch.int64) << _ID_BITS).bitwise_or_(_ID_MASK - ids)
    ordered: Tensor = _ID_MASK - keys.topk(count, dim=-1).values.bitwise_and_(_ID_MASK)
    return ordered


def top_k_lists(
    scaled: Float[Tensor, "rows vocab_size"],
    top_k: Int[Tensor, "rows 1"],
    top_p: Float[Tensor, "rows 1"],
    longest: int,
) -> tuple[Int[Tensor, "rows longest"], Bool[Tensor, "rows longest"]]:
    """The `longest` (the largest of `top_k`) likeliest ids of each row, and which of them
    its own top-k keeps, and then its top-p of what top-k left.

    `scaled` is logits / temperature, at most 0 (the row's largest subtracted). `top_p`
    (float64) is inf where it is off.
    """
    ids = largest(scaled, longest)
    ranks = torch.arange(longest, device=scaled.device)
    kept = ranks < top_k
    weights = scaled.gather(1, ids).double().exp_() * kept
    mass = weights.cumsum(dim=-1)
    return ids, kept & _within_nucleus(mass, top_p * mass[:, -1:])


def mass_ahead(
    probabilities: Float[Tensor, "rows vocab_size"],
    values: Float[Tensor, "rows vocab_size"],
    token_ids: Int[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """The probability of all tokens that come before `token_ids` in the order of `values`,
    float64. A token is in the nucleus of top-p if this is less than top_p."""
    ahead = ahead_of(values, token_ids)
    if values.device.type == "cpu":  # summed by NumPy row by row, whatever the threads
        masked = np.multiply(probabilities.numpy(), ahead.numpy())
        return torch.from_numpy(np.add.reduce(masked, axis=1, dtype=np.float64))
    return (probabilities.double() * ahead).sum(dim=-1)


def ahead_of(
    values: Float[Tensor, "rows vocab_size"], token_ids: Int[Tensor, " rows"]
) -> Bool[Tensor, "rows vocab_size"]:
    """Which tokens come before `token_ids` in the order of their row."""
    chosen = token_ids[:, None]
    reference = values.gather(1, chosen)
    ids = torch.arange(values.shape[1], device=values.device)
    if values.device.type != "cpu":
        return (values > reference) | ((values == reference) & (ids < chosen))
    # NumPy compares several times faster than torch on the CPU; ties are mostly absent.
    ahead = values.numpy() > reference.numpy()
    ties = values.numpy() == reference.numpy()
    if np.count_nonzero(ties) > len(ties):
        ahead |= ties & (ids.numpy() < chosen.numpy())
    return torch.from_numpy(ahead)


def _within_nucleus(
    mass: Float[Tensor, "rows ids"], wanted: Float[Tensor, "rows 1"]
) -> Bool[Tensor, "rows ids"]:
    """The smallest set of likeliest tokens whose probability reaches `wanted`: a token is
    in it if those before it do not reach it yet (Holtzman et al. 2020, arXiv:1904.09751)."""
    before = F.pad(mass[:, :-1], (1, 0))
    return before < wanted
