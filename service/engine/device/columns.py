"""What the rows of a step ask of the sampler, as columns of numbers for the device."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from model.adjustments import SMALLEST_PENALTY, banned_tokens
from model.noise import seed_words
from service.engine.sequence import UNREAD, Sequence

_LARGEST = float(np.finfo(np.float32).max)


def bits_of(value: float) -> int:
    """A float32 as the int32 of the same bits."""
    return int(np.float32(value).view(np.int32))


@dataclass(slots=True)
class Columns:
    """One entry a row, and the places of the logits that penalties and biases concern."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    inverse_temperature: list[float] = field(default_factory=list)
    top_k: list[int] = field(default_factory=list)
    top_p: list[float] = field(default_factory=list)
    min_p: list[float] = field(default_factory=list)
    seeds: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    positions: list[int] = field(default_factory=list)
    repetition: list[float] = field(default_factory=list)
    unread_seats: list[int] = field(default_factory=list)
    unread_amounts: list[float] = field(default_factory=list)
    penalty_starts: list[int] = field(default_factory=lambda: [0])
    bias_starts: list[int] = field(default_factory=lambda: [0])
    penalties: list[tuple[int, int, int]] = field(default_factory=list)
    biases: list[tuple[int, int]] = field(default_factory=list)
    logprobs: list[tuple[int, int]] = field(default_factory=list)  # (row, alternatives)
    refused: dict[int, str] = field(default_factory=dict)

    @property
    def has_adjustments(self) -> bool:
        """Whether the logits of any row are changed."""
        return bool(self.penalties or self.biases) or max(self.unread_seats, default=-1) >= 0

    def add(self, sequence: Sequence) -> None:
        """The next row draws the token after the end of `sequence`."""
        params, row = sequence.sampling, len(self.positions)
        self.positions.append(len(sequence.token_ids))
        temperature = params.temperature
        # The smallest temperatures have no float32 inverse; the largest float32 will do.
        inverse = 1.0 / max(temperature, 1 / _LARGEST) if temperature > 0 else 0.0
        self.inverse_temperature.append(inverse)
        self.top_k.append(params.top_k)
        self.top_p.append(params.top_p)
        self.min_p.append(math.log(params.min_p) if params.min_p > 0 else -_LARGEST)
        for column, word in zip(self.seeds, seed_words(params.seed), strict=True):
            column.append(word)
        if params.logprobs is not None:
            self.logprobs.append((row, params.logprobs))
        self._add_adjustments(sequence, row)

    def _add_adjustments(self, sequence: Sequence, row: int) -> None:
        params = sequence.sampling
        repetition, unread_seat, unread_amount = 1.0, -1, 0.0
        banned = banned_tokens(params, sequence.num_output, self.eos_token_ids)
        outside = [i for i in (*params.logit_bias, *banned) if not 0 <= i < self.vocab_size]
        if outside:
            self.refused[row] = (
                f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}"
            )
        else:
            if params.has_penalties:
                if params.repetition_penalty != 1.0:
                    repetition = max(params.repetition_penalty, SMALLEST_PENALTY)
                known = sequence.token_ids
                if known[-1] == UNREAD:
                    known, unread_seat = known[:-1], sequence.seat
                counts = Counter(known[sequence.num_prompt :])
                amounts = [
                    bits_of(params.presence_penalty + params.frequency_penalty * n if n else 0.0)
                    for n in range(max(counts.values(), default=0) + 2)
                ]
                unread_amount = params.presence_penalty + params.frequency_penalty
                concerned = dict.fromkeys(known) if repetition != 1.0 else counts
                self.penalties += [
                    (token, amounts[counts[token]], amounts[counts[token] + 1])
                    for token in concerned
                ]
            changes = {token: float(bias) for token, bias in params.logit_bias.items()}
            changes |= dict.fromkeys(banned, -math.inf)
            self.biases += [(token, bits_of(bias)) for token, bias in changes.items()]
        self.repetition.append(repetition)
        self.unread_seats.append(unread_seat)
        self.unread_amounts.append(unread_amount)
        self.penalty_starts.append(len(self.penalties))
        self.bias_starts.append(len(self.biases))
