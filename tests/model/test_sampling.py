"""The sampler against a slow oracle of one row, against exact distributions, and against
itself in other company."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from model.noise import gumbel, row_keys, seed_words, token_words
from model.sampling import (
    ChosenLogprob,
    SampledTokens,
    SamplingBatch,
    SamplingRow,
    sample,
)
from model.sampling_params import SamplingParams
from model.truncation import largest

EOS = (2, 5)
CPU = torch.device("cpu")


def draw(logits: Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
    return sample(logits, SamplingBatch.build(rows, logits.shape[1], "cpu", EOS))


def draw_one(logits: Sequence[float], **params: Any) -> int:
    row = SamplingRow(SamplingParams(**params), position=0)
    return int(draw(torch.tensor([list(logits)]), [row]).token_ids[0])


# The oracle: one row, plain Python, nothing clever. float32 only where the sampler
# promises a float32 rounding.


def adjusted_by_hand(logits: list[float], row: SamplingRow) -> list[float]:
    params, output = row.params, list(row.output_token_ids)
    scores = [np.float32(x) for x in logits]
    for i in {*row.prompt_token_ids, *output}:
        factor = np.float32(params.repetition_penalty)
        scores[i] = scores[i] / factor if scores[i] > 0 else scores[i] * factor
    for i in set(output):
        amount = params.presence_penalty + params.frequency_penalty * output.count(i)
        scores[i] = scores[i] - np.float32(amount)
    for i, bias in params.logit_bias.items():
        scores[i] = scores[i] + np.float32(bias)
    if len(output) < params.min_tokens:
        for i in params.stop_token_ids + (() if params.ignore_eos else EOS):
            scores[i] = np.float32(-math.inf)
    return [float(x) for x in scores]


def kept_by_hand(scores: list[float], params: SamplingParams) -> tuple[list[float], list[int]]:
    """Scaled scores, and the ids that may be drawn, likeliest first."""
    inverse = np.float32(1 / params.temperature)
    scaled = [float((np.float32(x) - np.float32(max(scores))) * inverse) for x in scores]
    order = sorted(
        (i for i in range(len(scaled)) if scaled[i] > -math.inf), key=lambda i: (-scaled[i], i)
    )
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1:
        total, mass, nucleus = math.fsum(math.exp(scaled[i]) for i in order), 0.0, []
        for i in order:
            # The sampler's float32 may decide otherwise within this of the border; the
            # tests draw their numbers so that none comes near.
            assert abs(mass - params.top_p * total) > 1e-5 * total
            if mass < params.top_p * total:
                nucleus.append(i)
            mass += math.exp(scaled[i])
        order = nucleus
    if params.min_p:
        order = [i for i in order if scaled[i] >= float(np.float32(math.log(params.min_p)))]
    return scaled, order


def chosen_by_hand(logits: list[float], row: SamplingRow) -> int:
    scores = adjusted_by_hand(logits, row)
    if row.params.temperature == 0:
        return max(range(len(scores)), key=lambda i: (scores[i], -i))
    scaled, order = kept_by_hand(scores, row.params)
    keys = row_keys(
        torch.tensor([seed_words(row.params.seed)], dtype=torch.int32),
        torch.tensor([row.position], dtype=torch.int32),
    )
    noise = gumbel(keys, token_words(len(scores), CPU)[None])[0].tolist()
    return max(order, key=lambda i: (scaled[i] + noise[i], -i))


def near_a_border(logits: list[float], row: SamplingRow) -> bool:
    """Whether top_p falls so close to a border that float32 decides."""
    if row.params.temperature == 0:
        return False
    try:
        kept_by_hand(adjusted_by_hand(logits, row), row.params)
    except AssertionError:
        return True
    return False


VOCAB = 24
token_id = st.integers(0, VOCAB - 1)
# Multiples of 1/4: ties happen all the time.
logit_rows = st.lists(st.integers(-24, 24).map(lambda x: x / 4), min_size=VOCAB, max_size=VOCAB)
any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, VOCAB - 1, VOCAB, 1000]),
    top_p=st.sampled_from([1e-6, 0.137, 0.517, 0.913, 1.0]),
    min_p=st.sampled_from([0.0, 0.011, 0.3, 0.99]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 0.7]),
    frequency_penalty=st.sampled_from([-1.1, 0.0, 0.4]),
    logit_bias=st.dictionaries(token_id, st.sampled_from([-100.0, -1.5, 0.25, 3.0]), max_size=4),
    min_tokens=st.sampled_from([0, 3]),
    stop_token_ids=st.sampled_from([(), (7,), (7, 2, 7)]),
    ignore_eos=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    logprobs=st.sampled_from([None, 0, 1, 5, 20]),
)
any_row = st.builds(
    SamplingRow,
    params=any_params,
    position=st.integers(0, 200_000),
    prompt_token_ids=st.lists(token_id, max_size=6),
    output_token_ids=st.lists(token_id, max_size=6),
)


@given(rows=st.lists(st.tuples(logit_rows, any_row), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_any_mix_of_rows_chooses_what_the_oracle_chooses_for_each(
    rows: list[tuple[list[float], SamplingRow]],
) -> None:
    rows = [(logits, row) for logits, row in rows if not near_a_border(logits, row)]
    if not rows:
        return
    before = torch.tensor([logits for logits, _ in rows])
    logits = before.clone()
    sampled = draw(logits, [row for _, row in rows])
    assert sampled.bad_rows == {}
    assert sampled.token_ids.tolist() == [chosen_by_hand(*each) for each in rows]
    assert torch.equal(logits, before)


@given(row=any_row, logits=logit_rows)
@settings(max_examples=150, deadline=None)
def test_adjusted_logits_are_the_oracles_bit_for_bit(row: SamplingRow, logits: list[float]) -> None:
    batch = SamplingBatch.build([SamplingRow(SamplingParams(), 0), row], VOCAB, "cpu", EOS)
    both = torch.tensor([logits, logits])
    adjusted = both if batch.adjustments is None else batch.adjustments.apply(both)
    assert adjusted[0].tolist() == logits
    assert adjusted[1].tolist() == adjusted_by_hand(logits, row)


# Distributions. Draws of one seed at many positions, against the exact probabilities.

NUM_DRAWS = 24_000
LOGITS = [2.0, 1.5, 1.5, 0.3, -0.2, 1.9, -1.0, -4.0, 0.0, 0.8, -30.0, 1.1]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 4},
    "top_k through a tie": {"top_k": 3},
    "top_p": {"top_p": 0.713},
    "min_p": {"min_p": 0.2},
    "top_k and top_p": {"top_k": 6, "top_p": 0.613},
    "top_p and min_p": {"top_p": 0.95, "min_p": 0.15, "temperature": 1.3},
    "top_k and min_p": {"top_k": 5, "min_p": 0.7, "temperature": 1.7},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "bias": {"logit_bias": {7: 5.0, 0: -100.0}},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (0,)},
    "min_tokens, ignore_eos": {"min_tokens": 9, "ignore_eos": True},
    "everything": {
        "temperature": 0.8,
        "top_k": 8,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "logit_bias": {4: 1.0},
        "min_tokens": 9,
    },
}


@pytest.mark.parametrize("vary", ["position", "seed"])
@pytest.mark.parametrize("name", SETTINGS)
def test_draws_have_the_exact_distribution(name: str, vary: str) -> None:
    params = SamplingParams(**SETTINGS[name], seed=2024)
    rows = [
        SamplingRow(params, i, (1, 9), (3, 3, 0))
        if vary == "position"
        else SamplingRow(replace(params, seed=i), 17, (1, 9), (3, 3, 0))
        for i in range(NUM_DRAWS)
    ]
    token_ids = draw(torch.tensor([LOGITS] * NUM_DRAWS), rows).token_ids.numpy()

    scaled, kept = kept_by_hand(adjusted_by_hand(LOGITS, rows[0]), params)
    weights = np.array([math.exp(scaled[i]) for i in kept])
    expected = weights / weights.sum() * NUM_DRAWS
    observed = np.bincount(token_ids, minlength=len(LOGITS))
    assert observed.sum() == observed[kept].sum(), "a token outside the truncation was drawn"
    # Cells with few expected draws are taken together, as the chi-square test asks.
    rare = expected < 8
    cells = [*zip(observed[kept][~rare], expected[~rare], strict=True)]
    if expected[rare].sum() >= 1:
        cells.append((observed[kept][rare].sum(), expected[rare].sum()))
    if len(cells) > 1:
        seen, wanted = np.array(cells, dtype=np.float64).T
        wanted *= seen.sum() / wanted.sum()  # what was too rare to test at all
        assert stats.chisquare(seen, wanted).pvalue > 1e-4


def test_draws_over_a_real_vocabulary_have_the_exact_distribution() -> None:
    """Through the cheap bound, chunks of rows and a vocabulary of GPT-2's size."""
    vocab_size, num_draws = 50_257, 2_000
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * 3
    probabilities = torch.softmax(logits.double(), 0)
    rank_of = probabilities.argsort(descending=True).argsort()
    # Ten groups of tokens of about the same probability each.
    cell_of = ((probabilities.sort(descending=True).values.cumsum(0) - 1e-12) * 10).long()[rank_of]
    expected = torch.zeros(10, dtype=torch.float64).index_add_(0, cell_of, probabilities)
    observed = np.zeros(10)
    for start in range(0, num_draws, 100):
        rows = [SamplingRow(SamplingParams(seed=8), start + i) for i in range(100)]
        token_ids = draw(logits.expand(100, -1), rows).token_ids
        observed += np.bincount(cell_of[token_ids].numpy(), minlength=10)
    assert stats.chisquare(observed, expected.numpy() * num_draws).pvalue > 1e-4


# Details that a distribution would not show.


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert draw_one([1.0, 3.0, 3.0, 0.0, 3.0], temperature=0.0) == 1


def test_top_k_keeps_exactly_k_of_equal_logits_the_lowest_ids() -> None:
    drawn = {draw_one([0.0] * 50, top_k=3, seed=seed) for seed in range(200)}
    assert drawn == {0, 1, 2}


def test_top_p_cuts_through_equal_logits_at_the_lowest_ids() -> None:
    drawn = {draw_one([0.0] * 8, top_p=0.5, seed=seed) for seed in range(300)}
    assert drawn == {0, 1, 2, 3}  # exactly 4/8; the fourth reaches it


def test_a_tiny_temperature_is_greedy_and_not_an_overflow() -> None:
    logits = [1e4, 1e4 + 1, -1e30, 0.0]
    for temperature in (1e-3, 1e-30, 1e-45, 5e-324):
        assert draw_one(logits, temperature=temperature) == 1


@pytest.mark.parametrize("penalty", [5e-324, 1e-45, 1e-38, 1e-20])
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-6, 1.0])
def test_a_tiny_repetition_penalty_is_no_overflow(penalty: float, temperature: float) -> None:
    """As float32 it is 0, or small enough to make a logit infinite: the request failed with 500."""
    params = SamplingParams(repetition_penalty=penalty, temperature=temperature, logprobs=3)
    row = SamplingRow(params, 0, prompt_token_ids=[1, 3], output_token_ids=[0])
    sampled = draw(torch.tensor([[-5.0, 20.0, 30.0, 90.0, 0.0]]), [row])
    assert sampled.bad_rows == {}
    assert sampled.token_ids.tolist() == [3]


def test_zero_and_minus_zero_are_equal() -> None:
    assert largest(torch.tensor([[-0.0, 0.0, -1.0, -0.0, 0.0]]), 4).tolist() == [[0, 1, 3, 4]]


@pytest.mark.parametrize("vocab_size", [1, 33, 640, 5_003])
@pytest.mark.parametrize("count", [1, 7, 50])
@pytest.mark.parametrize("levels", [2, 40, 10**9])
def test_largest_is_the_head_of_a_stable_sort(vocab_size: int, count: int, levels: int) -> None:
    count = min(count, vocab_size)
    generator = torch.Generator().manual_seed(vocab_size)
    values = torch.randint(-levels, levels, (9, vocab_size), generator=generator).float() / 7
    values[values > values.max() * 0.99] = -math.inf
    expected = np.argsort(-values.numpy(), axis=1, kind="stable")[:, :count]
    assert largest(values, count).tolist() == expected.tolist()


def test_min_tokens_holds_off_ends_and_ignore_eos_lets_end_of_text_through() -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0, 2.0, 3.0, 8.0, 7.0]])  # 2 and 5 are end-of-text

    def first(output: tuple[int, ...], **params: Any) -> int:
        row = SamplingRow(SamplingParams(temperature=0.0, **params), 5, (1,), output)
        return int(draw(logits, [row]).token_ids[0])

    assert first(()) == 2
    assert first((1,), min_tokens=2) == 6
    assert first((1,), min_tokens=2, stop_token_ids=(6,)) == 4
    assert first((1, 1), min_tokens=2, stop_token_ids=(6,)) == 2
    assert first((1,), min_tokens=2, stop_token_ids=(6,), ignore_eos=True) == 2


# The same in any company (architecture.md, law 5), bit for bit.


def random_row(rng: random.Random, vocab_size: int) -> SamplingRow:
    def maybe(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.35 else default

    params = SamplingParams(
        temperature=rng.choice([0.0, 0.6, 1.0, 1.0]),
        top_k=maybe(rng.choice([1, 3, 50]), 0),
        top_p=maybe(rng.uniform(0.3, 0.99), 1.0),
        min_p=maybe(rng.uniform(0.001, 0.3), 0.0),
        repetition_penalty=maybe(1.2, 1.0),
        frequency_penalty=maybe(0.3, 0.0),
        logit_bias=maybe({rng.randrange(vocab_size): 2.0}, {}),
        min_tokens=maybe(50, 0),
        logprobs=maybe(rng.choice([0, 5, 20]), None),
        seed=rng.getrandbits(63),
    )
    output = [rng.randrange(vocab_size) for _ in range(20)]
    return SamplingRow(params, rng.randrange(10_000), output[:10], output)


def outcome(sampled: SampledTokens, row: int) -> tuple[int, ChosenLogprob | None]:
    logprob = None if sampled.logprobs is None else sampled.logprobs[row]
    return int(sampled.token_ids[row]), logprob


@pytest.mark.parametrize("vocab_size", [61, 4096, 50_257])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16 with ties"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_alone_in_a_crowd_and_in_another_crowd(
    vocab_size: int, bfloat16: bool, threads: int
) -> None:
    rng = random.Random(vocab_size)
    rows = [random_row(rng, vocab_size) for _ in range(40)]
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(1)) * 4
    if bfloat16:
        logits = logits.bfloat16().float()
    usual_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        crowd = draw(logits, rows)
        assert crowd.bad_rows == {}
        for i in range(40):
            assert outcome(draw(logits[i : i + 1], [rows[i]]), 0) == outcome(crowd, i)
        order = rng.sample(range(40), 23)
        other = draw(logits[order], [rows[i] for i in order])
        for place, i in enumerate(order):
            assert outcome(other, place) == outcome(crowd, i)
    finally:
        torch.set_num_threads(usual_threads)


# Log-probabilities.


@pytest.mark.parametrize("vocab_size", [30, 4096])
def test_logprobs_are_of_the_raw_logits_whatever_else_is_asked(vocab_size: int) -> None:
    logits = (
        (torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0)) * 3).half().float()
    )
    params = SamplingParams(temperature=1.7, top_k=9, logprobs=20, logit_bias={4: 3.0})
    rows = [SamplingRow(params, i) for i in range(3)]
    rows[1] = SamplingRow(SamplingParams(), 0)
    sampled = draw(logits, rows)
    assert sampled.logprobs is not None
    assert sampled.logprobs[1] is None
    for i in (0, 2):
        chosen = sampled.logprobs[i]
        assert chosen is not None
        exact = torch.log_softmax(logits[i].double(), 0).tolist()
        order = sorted(range(vocab_size), key=lambda v: (-logits[i, v].item(), v))
        assert chosen.token_id == sampled.token_ids[i]
        assert chosen.logprob == pytest.approx(exact[chosen.token_id], abs=2e-6)
        assert chosen.rank == order.index(chosen.token_id) + 1
        assert [token for token, _ in chosen.top] == order[:20]
        assert [value for _, value in chosen.top] == pytest.approx(
            [exact[v] for v in order[:20]], abs=2e-6
        )


def test_as_many_alternatives_as_asked_and_no_more_than_there_are_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    rows = [SamplingRow(SamplingParams(temperature=0.0, logprobs=count), 0) for count in (0, 2, 20)]
    sampled = draw(logits, rows)
    assert sampled.logprobs is not None
    first, second, third = sampled.logprobs
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.token_id, first.rank, first.top) == (1, 1, ())
    assert [token for token, _ in second.top] == [0, 2]
    assert [token for token, _ in third.top] == [0, 1, 2]


# One bad row hurts only itself (law 6).


@pytest.mark.parametrize(
    "poison", [[math.nan], [math.inf], [math.nan, math.inf], [-math.inf] * 4096]
)
def test_a_poisoned_row_is_reported_and_its_neighbours_are_as_without_it(
    poison: list[float],
) -> None:
    rng = random.Random(5)
    kinds = [
        {"temperature": 0.0},
        {},
        {"min_p": 0.1},
        {"top_k": 5},
        {"top_p": 0.9},
        {"top_k": 5, "top_p": 0.5},
    ]
    rows = [
        SamplingRow(SamplingParams(**kind, seed=rng.getrandbits(63), logprobs=3), i)
        for kind in kinds
        for i in range(3)
    ]
    logits = torch.randn(len(rows), 4096, generator=torch.Generator().manual_seed(2))
    clean = draw(logits, rows)
    poisoned = logits.clone()
    bad = set(range(1, len(rows), 3))
    for row in bad:
        poisoned[row, 100 : 100 + len(poison)] = torch.tensor(poison)[: 4096 - 100]
        if len(poison) == 4096:
            poisoned[row] = -math.inf
    sampled = draw(poisoned, rows)
    assert set(sampled.bad_rows) == bad
    assert sampled.logprobs is not None
    for row in range(len(rows)):
        if row in bad:
            assert sampled.token_ids[row] == 0
            assert sampled.logprobs[row] is None
        else:
            assert outcome(sampled, row) == outcome(clean, row)


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {99: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"min_tokens": 2, "stop_token_ids": (1, 99)},
    ],
)
def test_a_token_outside_the_vocabulary_is_refused_for_its_row_alone(
    params: dict[str, Any],
) -> None:
    rows = [SamplingRow(SamplingParams(**p, temperature=0.0), 0) for p in ({}, params, {})]
    sampled = draw(torch.eye(3, 10), rows)
    assert list(sampled.bad_rows) == [1]
    assert "outside the vocabulary of 10" in sampled.bad_rows[1]
    assert sampled.token_ids.tolist() == [0, 0, 2]


def test_a_row_whose_every_token_is_held_off_says_so() -> None:
    params = SamplingParams(min_tokens=1, stop_token_ids=tuple(range(10)))
    sampled = draw(torch.zeros(1, 10), [SamplingRow(params, 0)])
    assert "no token is left" in sampled.bad_rows[0]


def test_logits_of_another_batch_are_refused() -> None:
    batch = SamplingBatch.build([SamplingRow(SamplingParams(), 0)], 10, "cpu")
    with pytest.raises(ValueError, match=r"\(1, 10\).*got torch.float32 of shape \(2, 10\)"):
        sample(torch.zeros(2, 10), batch)
    with pytest.raises(ValueError, match=r"got torch.float16"):
        sample(torch.zeros(1, 10, dtype=torch.float16), batch)


def test_no_rows_are_no_tokens() -> None:
    assert sample(torch.zeros(0, 10), SamplingBatch.build([], 10, "cpu")).token_ids.tolist() == []


def test_a_batch_of_plain_greedy_rows_builds_no_tensor() -> None:
    batch = SamplingBatch.build([SamplingRow(SamplingParams(temperature=0.0), 0)] * 64, 10, "cpu")
    assert batch == SamplingBatch(num_rows=64, vocab_size=10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_chooses_the_same_tokens() -> None:
    rng = random.Random(0)
    rows = [random_row(rng, 50_257) for _ in range(40)]
    logits = torch.randn(40, 50_257, generator=torch.Generator().manual_seed(1)) * 4
    on_cuda = sample(logits.cuda(), SamplingBatch.build(rows, 50_257, "cuda", EOS))
    assert on_cuda.token_ids.tolist() == draw(logits, rows).token_ids.tolist()
