"""A step that finds no memory is made smaller; nobody's request ends for it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from model.parallel import Group
from service.engine.core import EngineCore
from service.engine.device.runner import DeviceRunner
from service.engine.device.steps import DeviceSteps, StepPlan
from service.engine.ranks import Ranks
from service.engine.runner import Runner, is_out_of_memory
from service.engine.scheduler import Scheduled
from tests.engine.engines import (
    TINY,
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
CORES = {
    "plain": lambda: make_core(MODEL),
    "device": lambda: make_device_core(MODEL),
    "overlapped": lambda: make_device_core(MODEL, overlap=True),
}


@pytest.fixture(params=CORES)
def core(request: pytest.FixtureRequest) -> EngineCore:
    return CORES[request.param]()


class Shortage:
    """Raises for steps of more than `most` tokens, when all of their work was done; `sizes` has
    those that did not raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.most, self.sizes = most, list[int]()
        run, launch = Runner.run, DeviceSteps.launch

        def limited_run(runner: Runner, step: list[Scheduled], profile: Any) -> Any:
            done = run(runner, step, profile)
            self.check(sum(item.num_tokens for item in step))
            return done

        def limited_launch(steps: DeviceSteps, plan: StepPlan, *rest: Any) -> Any:
            done = launch(steps, plan, *rest)
            self.check(plan.layout.num_tokens)
            return done

        monkeypatch.setattr(Runner, "run", limited_run)
        monkeypatch.setattr(DeviceSteps, "launch", limited_launch)

    def check(self, num_tokens: int) -> None:
        if num_tokens > self.most:
            raise torch.OutOfMemoryError(f"{num_tokens} tokens")
        self.sizes.append(num_tokens)


def tokens_of(results: dict[int, Result]) -> dict[int, tuple[list[int], str, str | None]]:
    return {i: (r.token_ids, r.finish_reason, r.error) for i, r in results.items()}


@pytest.mark.parametrize("most", [5, 30])
def test_every_request_gets_its_tokens(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Whatever is preempted for it, with drawn tokens that nobody has read yet, too."""
    requests = random_requests(20, seed=11)
    expected = run_all(make_core(MODEL), requests)
    shortage = Shortage(monkeypatch, most)
    results = run_with_arrivals(core, requests, seed=12)
    assert tokens_of(results) == tokens_of(expected)
    assert max(shortage.sizes) <= most
    assert core.stats().memory_shortages > 0
    core.scheduler.pool.check()


def test_who_came_last_gives_way_and_comes_back(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.scheduler._patience = 6
    requests = [
        submit(i, [20 + i], max_tokens=40, temperature=0.0, ignore_eos=True) for i in range(8)
    ]
    expected = run_all(make_core(MODEL), requests)
    shortage = Shortage(monkeypatch, most=8)
    results: dict[int, Result] = {}
    for request in requests:
        core.add(request)
    for _ in range(5):
        collect(core.step(), results)
    assert len(core.scheduler.running) == 8
    shortage.most = 6  # something else takes memory
    collect(core.step(), results)
    assert [s.id for s in core.scheduler.running] == [0, 1, 2, 3]
    assert [s.id for s in core.scheduler.waiting] == [4, 5, 6, 7]
    assert core.stats().memory_shortages == 1
    assert core.stats().preemptions == 4
    shortage.most = 64  # and gives it back
    steps = 0
    while len(core.scheduler.running) < 8:
        collect(core.step(), results)
        steps += 1
        assert steps < 30, "larger steps are tried again"
    while core.has_work:
        collect(core.step(), results)
    assert tokens_of(results) == tokens_of(expected)


def test_what_does_not_fit_alone_costs_only_itself(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = random_requests(6, seed=5)
    expected = run_all(make_core(MODEL), requests)
    launch = core.runner.launch

    def limited(step: list[Scheduled], profile: Any) -> Any:
        if any(item.sequence.id == 99 for item in step):
            raise torch.OutOfMemoryError("nothing is left")
        return launch(step, profile)

    monkeypatch.setattr(type(core.runner), "launch", staticmethod(limited))
    results = run_all(core, [submit(99, [3] * 5, max_tokens=4), *requests])
    assert results.pop(99).error == "OutOfMemoryError: nothing is left"
    assert tokens_of(results) == tokens_of(expected)
    assert core.scheduler.max_running == core.scheduler.limits.max_num_seqs, "as before"


class NoOthers:
    """The ranks of an engine that has one: what `Ranks` does, without processes."""

    group = Group(0, 1)
    agree = Ranks.agree

    def launch(self, *_: object) -> None: ...

    def free_memory(self) -> None: ...


def test_what_a_failed_step_held_is_free_before_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where other ranks are heard before the error is raised, too; no collection has to help."""
    core = make_device_core(MODEL)
    core.runner._others = NoOthers()  # type: ignore[attr-defined]
    launch, free_memory = DeviceSteps.launch, DeviceRunner.free_memory
    held: list[weakref.ref[torch.Tensor]] = []

    def failing(steps: DeviceSteps, plan: StepPlan, *rest: Any) -> Any:
        if plan.layout.num_tokens > 4:
            activations = torch.empty(8)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("too many tokens")
        return launch(steps, plan, *rest)

    def watched(runner: DeviceRunner) -> None:
        assert held[-1]() is None
        free_memory(runner)

    monkeypatch.setattr(DeviceSteps, "launch", failing)
    monkeypatch.setattr(DeviceRunner, "free_memory", watched)
    gc.disable()
    try:
        results = run_all(core, [submit(1, list(range(3, 12)), max_tokens=3)])
    finally:
        gc.enable()
    assert len(held) == 1, "9 tokens did not fit, 4 did"
    assert len(results[1].token_ids) == 3


def test_words_of_libraries_that_find_no_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(RuntimeError("poison"))
