"""Which tokens a grammar lets each row choose, as bits; applied before temperature.

A word of 32 bits holds the tokens 32 * word .. 32 * word + 31, the lowest bit first: the layout
in which grammar libraries give their masks, 6 KiB for a row of 50,000 tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

BITS = 32


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The tokens that `rows` of the logits may choose; other rows may choose any. Bits beyond
    the vocabulary mean nothing."""

    rows: Int[Tensor, " masked"] | None  # None: all rows
    words: Int[Tensor, "masked words"]  # int32

    def apply_(self, scores: Float[Tensor, "rows vocab_size"]) -> None:
        """Set what is not allowed to -inf, in place. Raises `ValueError` when the words do not
        cover the vocabulary."""
        vocab_size, covered = scores.shape[1], self.words.shape[1] * BITS
        if covered < vocab_size:
            raise ValueError(f"the masks cover {covered} tokens; the vocabulary has {vocab_size}")
        # A sum with 0 or -inf, looked up eight tokens at a time: at 32 rows of 50,000 tokens
        # 2 ms, where shifting out the bits and a masked fill take 15.
        places = self.words.view(torch.uint8).int().view(-1)
        addends = _addends(scores.device).index_select(0, places)
        addends = addends.view(len(self.words), -1)[:, :vocab_size]
        if self.rows is None:
            scores.add_(addends)
        else:
            scores.index_add_(0, self.rows, addends)


@cache
def _addends(device: torch.device) -> Float[Tensor, "256 8"]:
    """What the eight bits of a byte add to eight scores: 0 where set, else -inf."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.where(bits == 1, 0.0, -math.inf).to(device)
