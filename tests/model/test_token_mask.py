"""The mask against bits read one by one, and what it does to the draw."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling import SampledTokens, SamplingBatch, SamplingRow, sample
from model.sampling_params import SamplingParams
from model.token_mask import TokenMask

VOCAB_SIZE = 75  # three words, the last one partly used
KINDS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.5},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.3, "logit_bias": {3: 100.0, 70: -100.0}},
)


def words_of(allowed: set[int], num_words: int = 3) -> list[int]:
    """The mask, one bit at a time."""
    words = [0] * num_words
    for token_id in allowed:
        words[token_id // 32] |= 1 << token_id % 32
    return [word - 2**32 if word >= 2**31 else word for word in words]  # as int32


def mask_of(allowed: dict[int, set[int]], num_rows: int) -> TokenMask:
    rows = None if len(allowed) == num_rows else torch.tensor(list(allowed))
    words = torch.tensor([words_of(ids) for ids in allowed.values()], dtype=torch.int32)
    return TokenMask(rows, words)


def draw(logits: torch.Tensor, rows: list[SamplingRow], mask: TokenMask | None) -> SampledTokens:
    return sample(logits, SamplingBatch.build(rows, VOCAB_SIZE, "cpu", (0,), mask))


token_sets = st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.none() | token_sets, min_size=1, max_size=5), st.integers(0, 2**32))
def test_what_is_not_allowed_is_minus_infinity_and_nothing_else_changes(
    allowed: list[set[int] | None], seed: int
) -> None:
    masked = {row: ids for row, ids in enumerate(allowed) if ids is not None}
    if not masked:
        return
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(allowed), VOCAB_SIZE, generator=generator)
    expected = scores.clone()
    for row, ids in masked.items():
        for token_id in range(VOCAB_SIZE):
            if token_id not in ids:
                expected[row, token_id] = -math.inf
    mask_of(masked, len(allowed)).apply_(scores)
    assert torch.equal(scores, expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(token_sets, min_size=len(KINDS), max_size=len(KINDS)), st.integers(0, 2**31))
def test_only_allowed_tokens_are_drawn_and_other_rows_keep_theirs(
    allowed: list[set[int]], seed: int
) -> None:
    """Every way to draw, each once with a mask and once without, in one batch."""
    logits = 3 * torch.randn(
        2 * len(KINDS), VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)
    )
    before = logits.clone()
    rows = [
        SamplingRow(
            SamplingParams(seed=seed, logprobs=2, **kind), position=7, prompt_token_ids=(1,)
        )  # type: ignore[arg-type]
        for kind in (*KINDS, *KINDS)
    ]
    masked = draw(logits, rows, mask_of(dict(enumerate(allowed)), len(rows)))
    free = draw(logits, rows, None)
    assert not masked.bad_rows
    for row, ids in enumerate(allowed):
        assert int(masked.token_ids[row]) in ids
    half = len(KINDS)
    assert torch.equal(masked.token_ids[half:], free.token_ids[half:])
    assert masked.logprobs is not None
    assert free.logprobs is not None
    assert masked.logprobs[half:] == free.logprobs[half:]
    for masked_row, free_row in zip(masked.logprobs, free.logprobs, strict=True):
        assert masked_row is not None
        assert free_row is not None
        assert masked_row.top == free_row.top, "log-probabilities are the model's own"
    assert torch.equal(logits, before)


def test_a_row_that_may_choose_nothing_is_bad_alone() -> None:
    rows = [SamplingRow(SamplingParams(seed=1), position=1)] * 3
    logits = torch.randn(3, VOCAB_SIZE)
    drawn = draw(logits, rows, mask_of({1: set()}, 3))
    assert list(drawn.bad_rows) == [1]
    assert "no token is left" in drawn.bad_rows[1]


def test_a_mask_that_does_not_cover_the_vocabulary_is_refused() -> None:
    mask = TokenMask(None, torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="64 tokens; the vocabulary has 75"):
        mask.apply_(torch.zeros(1, VOCAB_SIZE))
