"""The API steps aside for the engine's main thread, and what it starts has all cores."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.engine.this_cpu import this_cpu
from service.own_core import OwnCore
from tests.servers import running_server

CORES = os.sched_getaffinity(0)
several_cores = pytest.mark.skipif(len(CORES) < 2, reason="there is one core only")


@pytest.fixture
def own_core() -> Iterator[OwnCore]:
    made = OwnCore()
    yield made
    made.leave_none()


@several_cores
def test_it_leaves_the_core_it_is_told_of_with_all_its_threads(own_core: OwnCore) -> None:
    seen: list[set[int]] = []
    leave = threading.Event()

    def stand_by() -> None:
        leave.wait()
        seen.append(os.sched_getaffinity(0))

    bystander = threading.Thread(target=stand_by)
    bystander.start()
    try:
        for core in (min(CORES), max(CORES)):
            own_core.leave(core)
            assert os.sched_getaffinity(0) == CORES - {core}
            own_core.leave(None)
            assert os.sched_getaffinity(0) == CORES - {core}, "nothing was said"
        leave.set()
        bystander.join()
        assert seen == [CORES - {core}], "a thread stayed behind"
        own_core.leave_none()
        assert os.sched_getaffinity(0) == CORES
    finally:
        leave.set()


@several_cores
def test_a_thread_knows_where_it_is() -> None:
    try:
        for cpu in CORES:
            os.sched_setaffinity(0, {cpu})
            assert this_cpu() == cpu
    finally:
        os.sched_setaffinity(0, CORES)


@several_cores
def test_what_the_system_refuses_is_not_tried_again(
    own_core: OwnCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[int]] = []

    def refuse(thread: int, cores: set[int]) -> None:
        asked.append(cores)
        raise OSError(22, "Invalid argument")

    with monkeypatch.context() as patched:
        patched.setattr(os, "sched_setaffinity", refuse)
        for _ in range(3):
            own_core.leave(min(CORES))
            own_core.leave_none()
    assert len(asked) == 1


def test_on_one_core_there_is_nowhere_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {min(CORES)})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: asked.append(cores))
    alone = OwnCore()
    alone.leave(min(CORES))
    alone.leave_none()
    assert alone.count == 1
    assert not asked


@several_cores
def test_engine_and_standby_have_all_cores_and_the_api_does_not_share_the_engine_s(
    tmp_path: Path,
) -> None:
    with running_server(tmp_path, "--threads", str(len(CORES)), "--standby") as server:
        deadline = time.monotonic() + 20
        while len(server.engines()) < 2 or os.sched_getaffinity(server.process.pid) == CORES:
            assert time.monotonic() < deadline, "it never stepped aside"
            time.sleep(0.05)
        assert len(os.sched_getaffinity(server.process.pid)) == len(CORES) - 1
        for engine in server.engines():
            assert os.sched_getaffinity(engine.pid) == CORES
            assert all(os.sched_getaffinity(one.id) == CORES for one in engine.threads())
        for core in (min(CORES), max(CORES)):
            os.sched_setaffinity(server.engine.pid, {core})  # of its main thread
            deadline = time.monotonic() + 20
            while os.sched_getaffinity(server.process.pid) != CORES - {core}:
                assert time.monotonic() < deadline, f"the engine is on core {core}, and so is it"
                time.sleep(0.05)
        server.engine.kill()
        assert server.generate({"prompt": "Once", "max_tokens": 4})
        for engine in server.engines():
            assert os.sched_getaffinity(engine.pid) == CORES
