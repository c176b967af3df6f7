"""The scheduler without a model: a mock engine that "computes" by counting.

The mock's next token is a function of the sequence's whole text so far, as a greedy model's
is; so a lost, doubled or reordered token shows in the result.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling_params import SamplingParams
from service.engine.blocks import BlockPool
from service.engine.scheduler import Limits, Scheduler
from service.engine.sequence import Sequence

BLOCK_SIZE = 4


def make_scheduler(
    *, num_blocks: int = 64, max_num_seqs: int = 4, max_batched_tokens: int = 16
) -> Scheduler:
    limits = Limits(max_num_seqs, max_batched_tokens, max_model_len=64)
    return Scheduler(limits, BlockPool(num_blocks, BLOCK_SIZE))


def make_sequence(
    sequence_id: int, prompt: list[int], max_tokens: int, priority: int = 0
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(sequence_id, list(prompt), len(prompt), params, priority)


def next_token(token_ids: list[int]) -> int:
    return sum((i + 1) * t for i, t in enumerate(token_ids)) % 97


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids


class MockEngine:
    """Runs a scheduler to the end, checking what every step may and may not do."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.finished: dict[int, list[int]] = {}
        # What the "cache" holds: token and position per (block, offset), as a KV cache would.
        self.cache: dict[tuple[int, int], tuple[int, int]] = {}
        self.steps = 0

    def step(self) -> list[int]:
        scheduler = self.scheduler
        step = scheduler.schedule()
        self.steps += 1
        assert step, "there is work and nothing was scheduled: a dead end"
        assert sum(item.num_tokens for item in step) <= scheduler.limits.max_batched_tokens
        assert len(scheduler.running) <= scheduler.limits.max_num_seqs
        assert len({item.sequence.id for item in step}) == len(step)
        for item in step:
            assert item.num_tokens >= 1
            assert item.sequence in scheduler.running
            self.compute(item.sequence, item.num_tokens)
        for item in step:
            samples = item.samples
            scheduler.computed(scheduler.launched(item))
            if samples:
                sequence = item.sequence
                sequence.token_ids.append(next_token(sequence.token_ids))
                if sequence.num_output == sequence.sampling.max_tokens:
                    scheduler.remove(sequence)
                    self.finished[sequence.id] = sequence.token_ids
        scheduler.pool.check()
        return [item.sequence.id for item in step]

    def compute(self, sequence: Sequence, count: int) -> None:
        """Write the scheduled tokens and check that all earlier ones are still there."""
        end = sequence.num_computed + count
        for position in range(end):
            place = (sequence.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE)
            entry = (sequence.token_ids[position], position)
            if position >= sequence.num_computed:
                self.cache[place] = entry
            assert self.cache[place] == entry, "the cache lost or mixed up a token"


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=30),  # few values: prefixes repeat
        st.integers(1, 20),
        st.integers(-1, 1),
        st.integers(0, 3),  # steps until the next one arrives
    ),
    min_size=1,
    max_size=12,
)


@given(
    requests=requests,
    num_blocks=st.integers(13, 40),
    max_num_seqs=st.integers(1, 6),
    max_batched_tokens=st.integers(6, 24),
)
@settings(max_examples=150, deadline=None)
def test_every_request_gets_the_tokens_it_gets_alone(
    requests: list[tuple[list[int], int, int, int]],
    num_blocks: int,
    max_num_seqs: int,
    max_batched_tokens: int,
) -> None:
    """Whatever the arrivals, the chunks, the preemptions and the shared prefixes."""
    scheduler = make_scheduler(
        num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens
    )
    engine = MockEngine(scheduler)
    for sequence_id, (prompt, max_tokens, priority, gap) in enumerate(requests):
        scheduler.add(make_sequence(sequence_id, prompt, max_tokens, priority))
        for _ in range(gap):
            if scheduler.has_work:
                engine.step()
    while scheduler.has_work:
        engine.step()
        assert engine.steps < 3000, "no progress"
    for sequence_id, (prompt, max_tokens, _, _) in enumerate(requests):
        assert engine.finished[sequence_id] == alone(prompt, max_tokens)
    assert scheduler.pool.num_referenced == 0


def test_a_running_stream_does_not_stall_behind_a_long_prompt() -> None:
    scheduler = make_scheduler(max_batched_tokens=8)
    engine = MockEngine(scheduler)
    scheduler.add(make_sequence(1, [1, 2], max_tokens=20))
    engine.step()
    scheduler.add(make_sequence(2, list(range(40)), max_tokens=2))
    for _ in range(5):
        assert 1 in engine.step(), "the decode was left out of a step"


def test_lower_priority_numbers_run_first_and_arrival_breaks_ties() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    engine = MockEngine(scheduler)
    for sequence_id, priority in [(1, 0), (2, 5), (3, -5), (4, 0)]:
        scheduler.add(make_sequence(sequence_id, [sequence_id], 2, priority))
    while scheduler.has_work:
        engine.step()
    assert list(engine.finished) == [3, 1, 4, 2]


def test_preemption_takes_the_last_in_order_and_loses_nothing() -> None:
    scheduler = make_scheduler(num_blocks=6)
    engine = MockEngine(scheduler)
    for sequence_id in (1, 2, 3):
        scheduler.add(make_sequence(sequence_id, [sequence_id] * 5, max_tokens=12))
    while scheduler.has_work:
        engine.step()
    assert scheduler.num_preemptions > 0
    assert next(iter(engine.finished)) == 1, "the first in order was never preempted"
    for sequence_id in (1, 2, 3):
        assert engine.finished[sequence_id] == alone([sequence_id] * 5, 12)


def test_a_known_prefix_is_not_computed_again() -> None:
    scheduler = make_scheduler()
    engine = MockEngine(scheduler)
    prompt = list(range(10))
    scheduler.add(make_sequence(1, prompt, 1))
    while scheduler.has_work:
        engine.step()
    again = make_sequence(2, [*prompt, 77], 1)
    scheduler.add(again)
    engine.step()
    assert again.cached_prompt_tokens == 8  # two full blocks of four
    assert engine.finished[2] == alone([*prompt, 77], 1)
    assert (scheduler.num_cache_queries, scheduler.num_cache_hits) == (10 + 11, 8)


def test_a_wholly_known_prompt_still_computes_its_last_token() -> None:
    scheduler = make_scheduler()
    engine = MockEngine(scheduler)
    prompt = list(range(8))
    for sequence_id in (1, 2):
        sequence = make_sequence(sequence_id, prompt, 3)
        scheduler.add(sequence)
        while scheduler.has_work:
            engine.step()
    assert sequence.cached_prompt_tokens == 4
    assert engine.finished[1] == engine.finished[2]


def test_aborting_frees_the_blocks_at_once() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    engine = MockEngine(scheduler)
    running, waiting = make_sequence(1, [1] * 9, 5), make_sequence(2, [2] * 9, 5)
    scheduler.add(running)
    scheduler.add(waiting)
    engine.step()
    assert scheduler.pool.num_referenced > 0
    scheduler.remove(running)
    scheduler.remove(waiting)
    assert scheduler.pool.num_referenced == 0
    assert not scheduler.has_work


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = make_scheduler(num_blocks=5)
    assert scheduler.refusal(10, 10) is None
    assert "need 6 KV blocks of 4 tokens; the cache has 5" in str(scheduler.refusal(11, 10))
    assert "need 65 positions; the context has 64" in str(scheduler.refusal(60, 5))


def test_a_budget_that_could_starve_a_decode_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batched_tokens 3 is less than max_num_seqs 4"):
        Limits(max_num_seqs=4, max_batched_tokens=3, max_model_len=8)
