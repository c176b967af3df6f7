"""Logits -> tokens, without state: the same row gets the same token in any company.

    SamplingBatch.build(rows, ...)   what each row asked for, as tensors; nothing for plain rows
    sample(logits, batch)            -> SampledTokens

For each row, in this order:

    1. repetition, presence and frequency penalties, `logit_bias`, and -inf for what
       `min_tokens` holds off and what a grammar does not allow;
    2. temperature 0: the largest logit, the lowest id among equals; otherwise
    3. (logit - the row's largest) / temperature, in float32, as a product with 1 / temperature;
    4. top_k: exactly k tokens, at the border the lowest ids among equals;
    5. top_p of what top_k left, ordered likewise;
    6. min_p: tokens at least min_p times as likely as the likeliest;
    7. the largest of that plus Gumbel noise (model/noise.py).

Log-probabilities are those of the logits as they came. A row whose logits hold NaN or
+inf, or leave no token to choose, is reported in `bad_rows` and touches no other row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, DTypeLike
from torch import Tensor

from model.adjustments import Adjustments
from model.noise import gumbel, gumbel_argmax, row_keys, seed_words, token_words
from model.sampling_params import SamplingParams
from model.token_mask import TokenMask
from model.truncation import ahead_of, largest, mass_ahead, top_k_lists

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


class SamplingRow(NamedTuple):
    """One row of logits and what to draw from it.

    `position` is the place in its sequence of the token to be drawn (the prompt's first
    token is at 0): with the seed, it determines the noise. The token ids are read only for
    rows with penalties; their number, only with `min_tokens`.
    """

    params: SamplingParams
    position: int
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()


class ChosenLogprob(NamedTuple):
    """The model's own log-probability of a chosen token, its rank (1 is the likeliest; of
    equals the lowest id) and the likeliest alternatives as (token id, log-probability)."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """`bad_rows` gives the reason for each row that has no token; its id here is 0.
    `logprobs` has an entry for every row, None where none were asked for; it is None when no
    row asked."""

    token_ids: Int[Tensor, " rows"]
    bad_rows: Mapping[int, str] = field(default_factory=dict)
    logprobs: tuple[ChosenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """Rows of the batch that draw with noise in the same way; `rows` is None for all rows."""

    rows: Int[Tensor, " drawn"] | None
    keys: Int[Tensor, "drawn 2"]
    inverse_temperature: Float[Tensor, "drawn 1"]  # float32
    min_p: Float[Tensor, "drawn 1"] | None  # its logarithm, float32; None: off for all of them
    top_k: Int[Tensor, "drawn 1"]
    top_p: Float[Tensor, "drawn 1"]  # float64; inf: off
    longest: int  # the largest top_k

    @classmethod
    def build(
        cls, rows: Sequence[SamplingRow], chosen: list[int], device: torch.device
    ) -> DrawnRows | None:
        if not chosen:
            return None
        params = [rows[i].params for i in chosen]
        words = np.array([seed_words(p.seed) for p in params], np.int32)
        positions = np.array([rows[i].position for i in chosen], np.int32)
        # The smallest temperatures have no float32 inverse; the largest float32 will do.
        temperatures = np.maximum([p.temperature for p in params], 1 / _LARGEST_FLOAT32)

        def column(numbers: ArrayLike, dtype: DTypeLike) -> Tensor:
            return torch.from_numpy(np.array(numbers, dtype)[:, None]).to(device)

        min_p = None
        if any(p.min_p > 0.0 for p in params):
            floors = [math.log(p.min_p) if p.min_p > 0.0 else -_LARGEST_FLOAT32 for p in params]
            min_p = column(floors, np.float32)
        return cls(
            rows=None if len(chosen) == len(rows) else torch.tensor(chosen, device=device),
            keys=row_keys(torch.from_numpy(words), torch.from_numpy(positions)).to(device),
            inverse_temperature=column(1.0 / temperatures, np.float32),
            min_p=min_p,
            top_k=column([p.top_k for p in params], np.int64),
            top_p=column([p.top_p if p.top_p < 1.0 else math.inf for p in params], np.float64),
            longest=max(p.top_k for p in params),
        )


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What the rows of one step ask of the sampler. None, or an empty list, means that no
    row asked for that; a batch of plain greedy rows holds nothing at all."""

    num_rows: int
    vocab_size: int
    greedy: Int[Tensor, " greedy"] | None = None  # None: all rows that are in no group below
    untruncated: DrawnRows | None = None
    with_top_k: DrawnRows | None = None
    with_top_p: DrawnRows | None = None  # and no top_k
    adjustments: Adjustments | None = None
    mask: TokenMask | None = None
    logprobs: tuple[tuple[int, int], ...] = ()  # (row, how many alternatives)
    refused: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        rows: Sequence[SamplingRow],
        vocab_size: int,
        device: torch.device | str,
        eos_token_ids: Sequence[int] = (),
        mask: TokenMask | None = None,
    ) -> SamplingBatch:
        """Sort the rows by what they ask for; `mask` is what their grammars allow.

        A row that names a token outside the vocabulary is refused: it becomes one of
        `SampledTokens.bad_rows`.
        """
        device = torch.device(device)
        greedy: list[int] = []
        untruncated: list[int] = []
        with_top_k: list[int] = []
        with_top_p: list[int] = []
        adjusted: list[int] = []
        logprobs: list[tuple[int, int]] = []
        for i, row in enumerate(rows):
            params = row.params
            if params.temperature <= 0.0:
                greedy.append(i)
            elif 0 < params.top_k < vocab_size:
                with_top_k.append(i)
            elif params.top_p < 1.0:
                with_top_p.append(i)
            else:
                untruncated.append(i)
            if (
                params.logit_bias
                or params.has_penalties
                or len(row.output_token_ids) < params.min_tokens
            ):
                adjusted.append(i)
            if params.logprobs is not None:
                logprobs.append((i, params.logprobs))
        adjustments: Adjustments | None = None
        refused: dict[int, str] = {}
        if adjusted:
            adjustments, refused = Adjustments.build(
                (
                    (i, rows[i].params, rows[i].prompt_token_ids, rows[i].output_token_ids)
                    for i in adjusted
                ),
                vocab_size,
                device,
                eos_token_ids,
            )
        return cls(
            num_rows=len(rows),
            vocab_size=vocab_size,
            greedy=None if len(greedy) in (0, len(rows)) else torch.tensor(greedy, device=device),
            untruncated=DrawnRows.build(rows, untruncated, device),
            with_top_k=DrawnRows.build(rows, with_top_k, device),
            with_top_p=DrawnRows.build(rows, with_top_p, device),
            adjustments=adjustments,
            mask=mask,
            logprobs=tuple(logprobs),
            refused=refused,
        )


def sample(logits: Float[Tensor, "rows vocab_size"], batch: SamplingBatch) -> SampledTokens:
    """One token for each row. `logits` is float32 and is left as it was.

    Raises `ValueError` when the logits are not those of the batch; anything wrong with one
    row is told in `bad_rows`.
    """
    if logits.shape != (batch.num_rows, batch.vocab_size) or logits.dtype != torch.float32:
        raise ValueError(
            f"the batch has float32 logits of shape {(batch.num_rows, batch.vocab_size)}, "
            f"got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    if batch.num_rows == 0:
        return SampledTokens(torch.empty(0, dtype=torch.int64, device=logits.device))
    logits = logits.detach().contiguous()
    scores = logits if batch.adjustments is None else batch.adjustments.apply(logits)
    if batch.mask is not None:
        scores = logits.clone() if scores is logits else scores  # log-probabilities need them
        batch.mask.apply_(scores)
    parts = [
        (group.rows, *draw(_take(scores, group.rows), group))
        for group, draw in (
            (batch.untruncated, _draw_untruncated),
            (batch.with_top_k, _draw_top_k),
            (batch.with_top_p, _draw_top_p),
        )
        if group is not None
    ]
    if batch.greedy is not None or not parts:
        parts.append((batch.greedy, *_choose_greedy(_take(scores, batch.greedy))))
    token_ids, peaks = _merge(parts, batch.num_rows)
    bad_rows = find_bad_rows(peaks, batch.refused)
    if bad_rows:
        token_ids[list(bad_rows)] = 0
    return SampledTokens(token_ids, bad_rows, _logprobs(logits, token_ids, bad_rows, batch))


# What a way of choosing returns for its rows: the tokens, and each row's largest score,
# which is finite unless something in the row is wrong (NaN is larger than anything).
Chosen = tuple[Int[Tensor, " drawn"], Float[Tensor, " drawn"]]


def _choose_greedy(scores: Float[Tensor, "greedy vocab_size"]) -> Chosen:
    if scores.device.type == "cpu":  # NumPy's argmax takes a tenth of the time of torch's
        token_ids = torch.from_numpy(scores.numpy().argmax(axis=-1))
    else:
        token_ids = scores.argmax(dim=-1)
    return token_ids, scores.gather(1, token_ids[:, None])[:, 0]


def _draw_untruncated(scores: Float[Tensor, "drawn vocab_size"], group: DrawnRows) -> Chosen:
    scaled, peaks = _scale(scores, group)
    return gumbel_argmax(_floor_(scaled, group), group.keys), peaks


def _draw_top_k(scores: Float[Tensor, "drawn vocab_size"], group: DrawnRows) -> Chosen:
    """Noise is computed for the listed tokens alone."""
    scaled, peaks = _scale(scores, group)
    ids, kept = top_k_lists(scaled, group.top_k, group.top_p, group.longest)
    listed = scaled.gather(1, ids)
    if group.min_p is not None:
        kept = kept & (listed >= group.min_p)
    words = token_words(scaled.shape[1], scaled.device)[ids]
    noisy = (gumbel(group.keys, words) + listed).masked_fill_(~kept, -math.inf)
    return ids.gather(1, noisy.argmax(dim=-1, keepdim=True))[:, 0], peaks


def _draw_top_p(scores: Float[Tensor, "drawn vocab_size"], group: DrawnRows) -> Chosen:
    """Draw from all tokens, and where the token turns out to be outside the nucleus, so is
    every token after it in order: draw again from those before it. That ends with the
    nucleus's own argmax and sorts nothing; a row needs 1 / top_p draws or so."""
    scaled, peaks = _scale(scores, group)
    # float64 on CUDA, where softmax reduces a row in an order that depends on its alignment.
    dtype = torch.float64 if scaled.device.type == "cuda" else torch.float32
    probabilities = torch.softmax(scaled, dim=-1, dtype=dtype)
    scaled = _floor_(scaled, group)
    keys, top_p = group.keys, group.top_p[:, 0]
    drawn = gumbel_argmax(scaled, keys)
    token_ids, pending = drawn, torch.arange(len(drawn), device=drawn.device)
    while True:
        outside = (mass_ahead(probabilities, scaled, drawn) >= top_p).nonzero()[:, 0]
        if len(outside) == 0:
            return token_ids, peaks
        probabilities, keys, top_p = probabilities[outside], keys[outside], top_p[outside]
        scaled, drawn, pending = scaled[outside], drawn[outside], pending[outside]
        scaled = scaled.masked_fill_(~ahead_of(scaled, drawn), -math.inf)
        drawn = gumbel_argmax(scaled, keys)
        token_ids[pending] = drawn


def _floor_(
    scaled: Float[Tensor, "drawn vocab_size"], group: DrawnRows
) -> Float[Tensor, "drawn vocab_size"]:
    """min_p, in place: what lies below the floor by anything at all then lies below it by
    more than any noise makes up. (A masked fill takes ten times as long on the CPU.)"""
    if group.min_p is None:
        return scaled
    return scaled.add_((scaled - group.min_p).clamp_(max=0).mul_(_LARGEST_FLOAT32))


def _scale(
    scores: Float[Tensor, "drawn vocab_size"], group: DrawnRows
) -> tuple[Float[Tensor, "drawn vocab_size"], Float[Tensor, " drawn"]]:
    """(score - largest) / temperature, so at most 0 and 0 somewhere, and each row's largest.
    A row whose largest is not finite comes out as zeros, and may be drawn from like others."""
    peaks = scores.amax(dim=-1)
    scaled = (scores - peaks[:, None]).mul_(group.inverse_temperature)
    broken = ~peaks.isfinite()
    if broken.any():
        scaled[broken] = 0.0
    return scaled, peaks


def _take(
    scores: Float[Tensor, "rows vocab_size"], rows: Int[Tensor, " some"] | None
) -> Float[Tensor, "some vocab_size"]:
    return scores if rows is None else scores[rows]


def _merge(
    parts: list[tuple[Tensor | None, Tensor, Tensor]], num_rows: int
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Tokens and peaks of the groups, back in the order of the rows."""
    if len(parts) == 1:
        return parts[0][1], parts[0][2]
    token_ids, peaks = parts[0][1].new_empty(num_rows), parts[0][2].new_empty(num_rows)
    for rows, some_ids, some_peaks in parts:
        token_ids[rows], peaks[rows] = some_ids, some_peaks
    return token_ids, peaks


def find_bad_rows(peaks: Float[Tensor, " rows"], refused: Mapping[int, str]) -> dict[int, str]:
    """Why rows have no token: `refused` already, or their largest score is not finite."""
    bad_rows = dict(refused)
    if not peaks.isfinite().all():
        for row, peak in enumerate(peaks.tolist()):
            if peak == -math.inf:
                bad_rows.setdefault(row, "no token is left to choose: every logit is -inf")
            elif not math.isfinite(peak):
                bad_rows.setdefault(row, f"the model's logits hold {peak}")
    return bad_rows


def _logprobs(
    logits: Float[Tensor, "rows vocab_size"],
    token_ids: Int[Tensor, " rows"],
    bad_rows: Mapping[int, str],
    batch: SamplingBatch,
) -> tuple[ChosenLogprob | None, ...] | None:
    if not batch.logprobs:
        return None
    asked = tuple((row, count) for row, count in batch.logprobs if row not in bad_rows)
    if not asked:
        return (None,) * batch.num_rows
    return read_scores(score(logits, token_ids, asked), asked, batch.num_rows)


class Scores(NamedTuple):
    """What log-probabilities are made of, on the device of the logits."""

    token_ids: Int[Tensor, " asked"]
    logprobs: Float[Tensor, " asked"]
    ranks: Int[Tensor, " asked"]
    top_ids: Int[Tensor, "asked most"]
    top_logprobs: Float[Tensor, "asked most"]


def score(
    logits: Float[Tensor, "rows vocab_size"],
    token_ids: Int[Tensor, " rows"],
    asked: Sequence[tuple[int, int]],
) -> Scores:
    """Log-probability and rank of the token of each row in `asked`, (row, how many
    alternatives), and its likeliest tokens. Nothing is read back from the device."""
    most = min(max(count for _, count in asked), logits.shape[1])
    if len(asked) < len(logits):
        rows = torch.tensor([row for row, _ in asked], device=logits.device)
        logits, token_ids = logits[rows], token_ids[rows]
    chosen = token_ids.long()[:, None]
    # float64 on CUDA for the reason given in `_draw_top_p`.
    dtype = torch.float64 if logits.device.type == "cuda" else torch.float32
    logprobs = torch.log_softmax(logits, dim=-1, dtype=dtype)
    top_ids = largest(logits, most) if most else chosen[:, :0]
    return Scores(
        token_ids,
        logprobs.gather(1, chosen)[:, 0],
        ahead_of(logits, chosen[:, 0]).sum(dim=-1) + 1,
        top_ids,
        logprobs.gather(1, top_ids),
    )


def read_scores(
    scores: Scores, asked: Sequence[tuple[int, int]], num_rows: int
) -> tuple[ChosenLogprob | None, ...]:
    """An entry for every row, None for those that did not ask."""
    entries: list[ChosenLogprob | None] = [None] * num_rows
    top = zip(scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True)
    columns = (scores.token_ids.tolist(), scores.logprobs.tolist(), scores.ranks.tolist())
    for (row, count), token_id, logprob, rank, alternatives in zip(
        asked, *columns, top, strict=True
    ):
        likeliest = tuple(zip(*alternatives, strict=True))[:count]
        entries[row] = ChosenLogprob(token_id, logprob, rank, likeliest)
    return tuple(entries)
