"""The next step is prepared while one runs: the tokens are those of the plain loop.

The code is that of a GPU, run on a CPU: what a device would do later is done at once, and read
one step late all the same.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.transformer import Transformer
from service.engine.core import EngineCore
from service.engine.messages import Submit
from service.engine.scheduler import Scheduled
from tests.engine.engines import (
    TINY,
    TINY_GPT2,
    Result,
    collect,
    make_core,
    make_device_core,
    random_model,
    run_all,
    submit,
)
from tests.engine.test_mixing import random_requests, run_with_arrivals

MODEL = random_model(TINY)


def tokens_of(results: dict[int, Result]) -> dict[int, tuple[list[int], str, str | None]]:
    return {i: (r.token_ids, r.finish_reason, r.error) for i, r in results.items()}


@pytest.mark.parametrize("model", [MODEL, random_model(TINY_GPT2)], ids=["llama", "gpt2"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("buckets", [(), (1, 2, 4, 8, 16)])
def test_tokens_are_those_of_the_cpu(
    model: Transformer, overlap: bool, buckets: tuple[int, ...]
) -> None:
    """All kinds of sampling, from cached prefixes, in chunks, captured or not; and preempted."""
    requests = random_requests(24, seed=7)
    expected = run_all(make_core(model, max_batched_tokens=48), requests)
    core = make_device_core(
        model, num_blocks=40, max_batched_tokens=48, overlap=overlap, buckets=buckets
    )
    results = run_with_arrivals(core, requests, seed=8)
    assert tokens_of(results) == tokens_of(expected)
    assert core.scheduler.num_preemptions > 0
    for one in requests:
        ours, theirs = results[one.id].logprobs, expected[one.id].logprobs
        assert ours == pytest.approx(theirs, abs=1e-3)


@given(seed=st.integers(0, 2**32), num_blocks=st.integers(33, 60), seats=st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_overlapped_and_plain_loops_give_the_same_tokens(
    seed: int, num_blocks: int, seats: int
) -> None:
    """Whatever arrives when, ends early, is aborted half-way or gives its blocks back."""
    requests = random_requests(8, seed=seed)
    aborted = {one.id for one in random.Random(seed).sample(requests, 2)}
    results = []
    for overlap in (False, True):
        core = make_device_core(
            MODEL,
            num_blocks=num_blocks,
            max_num_seqs=seats,
            max_batched_tokens=24,
            overlap=overlap,
            buckets=(1, 2, 4),
        )
        results.append(run_and_abort(core, requests, aborted, seed))
    for one in requests:
        plain, overlapped = (result.get(one.id) for result in results)
        if one.id not in aborted:
            assert plain is not None
            assert overlapped is not None
            assert overlapped.token_ids == plain.token_ids
            assert overlapped.finish_reason == plain.finish_reason
        elif plain is not None and overlapped is not None:  # as far as they came
            shorter = min(len(plain.token_ids), len(overlapped.token_ids))
            assert overlapped.token_ids[:shorter] == plain.token_ids[:shorter]


def run_and_abort(
    core: EngineCore, requests: list[Submit], aborted: set[int], seed: int
) -> dict[int, Result]:
    rng = random.Random(seed)
    results: dict[int, Result] = {}
    pending = list(requests)
    while pending or core.has_work:
        if pending and rng.random() < 0.5:
            core.add(pending.pop(0))
        for sequence_id in aborted & set(core.sequences):
            if rng.random() < 0.1:
                core.abort(sequence_id)
        outputs = core.step()
        assert all(output.id in core.sequences or output.finish_reason for output in outputs)
        collect(outputs, results)
    core.scheduler.pool.check()
    assert core.scheduler.pool.num_referenced == 0
    assert not core.sequences
    return results


def test_the_next_step_is_launched_before_the_last_one_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make_device_core(MODEL, overlap=True)
    log = watch(core, monkeypatch)
    results = run_all(core, [submit(1, [1, 2, 3], max_tokens=4, temperature=0.0, ignore_eos=True)])
    assert log == ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]
    assert results[1].finish_reason == "length"


def test_a_stop_costs_one_token_that_nobody_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy: dict[str, Any] = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    free = run_all(make_device_core(MODEL), [submit(1, [5, 6], **greedy)])[1].token_ids
    stop = next(t for i, t in enumerate(free) if i >= 3 and t not in free[:i])
    core = make_device_core(MODEL, overlap=True)
    log = watch(core, monkeypatch)
    result = run_all(core, [submit(1, [5, 6], **greedy, stop_token_ids=(stop,))])[1]
    assert result.token_ids == free[: free.index(stop) + 1]
    assert result.finish_reason == "stop"
    assert log.count("launch") == len(result.token_ids) + 1


def watch(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order in which steps are launched and read."""
    log: list[str] = []
    launch = core.runner.launch

    class Logged:
        def __init__(self, result: Any) -> None:
            self.result = result
            self.sights = result.sights

        def read(self, profile: Any) -> Any:
            log.append("read")
            return self.result.read(profile)

    def logged(step: list[Scheduled], profile: Any) -> Logged:
        log.append("launch")
        return Logged(launch(step, profile))

    monkeypatch.setattr(core.runner, "launch", logged)
    return log


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_that_pad_a_bucket_change_nothing(overlap: bool) -> None:
    """Three sequences in a bucket of four, of sixteen, and in none: nobody's rows write into no
    block, and blocks that no sequence holds stay as they were."""
    requests = [
        submit(i, [i, 2, 3], max_tokens=9, seed=i, ignore_eos=True, logprobs=None)
        for i in range(1, 4)
    ]
    results = []
    for buckets in ((), (4,), (16,)):
        core = make_device_core(MODEL, overlap=overlap, buckets=buckets)
        results.append(tokens_of(run_all(core, requests)))
        cache = core.runner.cache
        used = cache.values.abs().sum(dim=(0, 2, 3, 4)).count_nonzero()
        assert used == 6  # two blocks of eight for eleven tokens of each
    assert results[0] == results[1] == results[2]


def test_log_probabilities_of_all_rows_of_a_bucket_take_one_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three rows that all ask, in a bucket of four: no row more is looked at."""
    core = make_device_core(MODEL, buckets=(4,))
    log = watch(core, monkeypatch)
    requests = [submit(i, [i, 2, 3], max_tokens=5, seed=i, ignore_eos=True) for i in range(1, 4)]
    results = run_all(core, requests)
    assert log.count("launch") == 5, "and not in halves, after an error that nobody sees"
    assert all(len(result.logprobs) == 5 for result in results.values())


def test_an_exception_costs_only_the_sequence_that_causes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the launch fails while the step before is under way."""
    requests = random_requests(8, seed=5)
    expected = run_all(make_device_core(MODEL), requests)
    core = make_device_core(MODEL, overlap=True)
    launch = core.runner.launch

    def poisoned(step: list[Scheduled], profile: Any) -> Any:
        if any(item.sequence.id == 99 and item.sequence.num_output >= 3 for item in step):
            raise RuntimeError("poison")
        return launch(step, profile)

    monkeypatch.setattr(core.runner, "launch", poisoned)
    poison = submit(99, [3] * 5, max_tokens=9, ignore_eos=True)
    results = run_all(core, [*requests[:4], poison, *requests[4:]])
    assert results.pop(99).error == "RuntimeError: poison"
    assert tokens_of(results) == tokens_of(expected)


def test_logits_that_are_not_finite_end_their_sequence_only() -> None:
    model = random_model(TINY)
    model.embedding.weight[7] = float("nan")
    good, bad = submit(1, [1, 2, 3], max_tokens=6), submit(2, [7, 2], max_tokens=6)
    expected = run_all(make_device_core(model), [good])
    results = run_all(make_device_core(model, overlap=True), [good, bad])
    assert results[1].token_ids == expected[1].token_ids
    assert "logits hold nan" in (results[2].error or "")
