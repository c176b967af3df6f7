"""The engine measures its machine once, when it has had nothing to do for a while."""

from __future__ import annotations

import pytest
import torch

from service.engine import idle
from service.engine.idle import IdleRoofline
from service.engine.messages import Measured
from service.engine.roofline import Effort

SMALL = Effort(2**16, 1, 512, 0.02, 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(idle.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(idle, "QUICK", SMALL)
    return now


def look_at(probe: IdleRoofline, clock: list[float], *times_s: float) -> list[Measured]:
    measured = []
    for clock[0] in times_s:
        if (found := probe.look()) is not None:
            measured.append(found)
    return measured


def test_not_before_it_is_quiet_and_then_once_in_two_halves(clock: list[float]) -> None:
    probe = IdleRoofline(torch.device("cpu"), "float32")
    assert look_at(probe, clock, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0) == []
    (measured,) = look_at(probe, clock, 4.5, 5.0, 5.5)
    assert measured.read_bytes_per_s > 0
    assert measured.flops_per_s > 0
    assert probe.is_over


def test_work_between_two_looks_starts_the_wait_anew(clock: list[float]) -> None:
    probe = IdleRoofline(torch.device("cpu"), "int8")
    quiet = [0.5 * step for step in range(1, 7)]
    later = [60 + 0.5 * step for step in range(8)]  # a minute of requests, then quiet
    assert look_at(probe, clock, *quiet, *later) == []
    assert len(look_at(probe, clock, 64.0, 64.5)) == 1


def test_short_memory_is_said_and_that_is_all(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: object) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(idle, "measure_reading", no_memory)
    probe = IdleRoofline(torch.device("cpu"), "float32")
    assert look_at(probe, clock, *(0.5 * step for step in range(20))) == []
    assert [record.message for record in caplog.records] == [
        "the roofline could not be measured: out of memory"
    ]
