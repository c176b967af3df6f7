"""What is done to the logits before a token is chosen: penalties, bias, tokens held off.

Only rows that ask for it are touched, each at a few places: everything here is a flat list
of places in (rows, vocab) with one number for each, gathered, changed and scattered back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from model.sampling_params import SamplingParams

# (row, its params, its prompt, its output)
Entry = tuple[int, SamplingParams, Sequence[int], Sequence[int]]


# A logit divided by less could be infinite, or 0 in float32 be divided by; between penalties as
# small as this no token's chance differs.
SMALLEST_PENALTY = 1e-30


@dataclass(frozen=True, slots=True)
class Change:
    """Numbers for some places of a flattened (rows, vocab), no place twice."""

    places: Int[Tensor, " places"]
    numbers: Float[Tensor, " places"]  # float32


@dataclass(frozen=True, slots=True)
class Adjustments:
    """One step's changes to the logits, in the order in which they act; None: nothing."""

    repetition: Change | None  # positive logits divided by the number, others multiplied
    frequency: Change | None  # subtracted: presence + count * frequency
    bias: Change | None  # added
    held_off: Change | None  # set: -inf

    @classmethod
    def build(
        cls,
        entries: Iterable[Entry],
        vocab_size: int,
        device: torch.device,
        eos_token_ids: Sequence[int],
    ) -> tuple[Adjustments, dict[int, str]]:
        """The changes, and for each row that names a token outside the vocabulary the
        reason why it cannot be served; nothing is changed for such a row."""
        repetition, frequency, bias, held_off = _Places(), _Places(), _Places(), _Places()
        refused: dict[int, str] = {}
        for row, params, prompt, output in entries:
            banned = banned_tokens(params, len(output), eos_token_ids)
            named = [*params.logit_bias, *banned]
            outside = [i for i in named if not 0 <= i < vocab_size]
            if outside:
                refused[row] = f"token id {outside[0]} is outside the vocabulary of {vocab_size}"
                continue
            start = row * vocab_size
            if params.has_penalties:
                # dict and set count a few hundred ids several times faster than NumPy sorts.
                if params.presence_penalty or params.frequency_penalty:
                    counts = Counter(output)
                    times = np.fromiter(counts.values(), np.float64, len(counts))
                    amounts = params.presence_penalty + params.frequency_penalty * times
                    frequency.add(start + np.fromiter(counts, np.int64, len(counts)), amounts)
                if params.repetition_penalty != 1.0:
                    seen = set(prompt).union(output)
                    factor = max(params.repetition_penalty, SMALLEST_PENALTY)
                    factors = np.full(len(seen), factor)
                    repetition.add(start + np.fromiter(seen, np.int64, len(seen)), factors)
            if params.logit_bias:
                ids = np.fromiter(params.logit_bias.keys(), np.int64)
                bias.add(start + ids, np.fromiter(params.logit_bias.values(), np.float64))
            if banned:
                ids = np.unique(np.array(banned, np.int64))
                held_off.add(start + ids, np.full(len(ids), -math.inf))
        changes = [places.change(device) for places in (repetition, frequency, bias, held_off)]
        return cls(*changes), refused

    def apply(self, logits: Float[Tensor, "rows vocab_size"]) -> Float[Tensor, "rows vocab_size"]:
        """The adjusted logits, new; the given ones are as they were."""
        adjusted = logits.clone()
        flat = adjusted.view(-1)
        if self.repetition is not None:  # Keskar et al. 2019, arXiv:1909.05858, section 4.1
            before, factor = flat[self.repetition.places], self.repetition.numbers
            flat[self.repetition.places] = torch.where(before > 0, before / factor, before * factor)
        if self.frequency is not None:
            flat[self.frequency.places] = flat[self.frequency.places] - self.frequency.numbers
        if self.bias is not None:
            flat[self.bias.places] = flat[self.bias.places] + self.bias.numbers
        if self.held_off is not None:
            flat[self.held_off.places] = self.held_off.numbers
        return adjusted


def banned_tokens(
    params: SamplingParams, num_output: int, eos_token_ids: Sequence[int]
) -> tuple[int, ...]:
    """The ids that would end the sequence too early. With `ignore_eos`, end-of-text ends
    nothing and is a token like any other."""
    if num_output >= params.min_tokens:
        return ()
    return params.stop_token_ids + (() if params.ignore_eos else tuple(eos_token_ids))


class _Places:
    """Collects one kind of change over the rows."""

    def __init__(self) -> None:
        self._places: list[NDArray[np.int64]] = []
        self._numbers: list[NDArray[np.float64]] = []

    def add(self, places: NDArray[np.int64], numbers: NDArray[np.float64]) -> None:
        self._places.append(places)
        self._numbers.append(numbers)

    def change(self, device: torch.device) -> Change | None:
        if not self._places:
            return None
        places = torch.from_numpy(np.concatenate(self._places))
        numbers = torch.from_numpy(np.concatenate(self._numbers).astype(np.float32))
        return Change(places.to(device), numbers.to(device))
