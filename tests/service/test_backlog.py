"""How long a refused client is told to wait: from what was seen to go away."""

from __future__ import annotations

import pytest

from service.backlog import LONGEST_WAIT_S, NUM_REMEMBERED, Backlog, DrainRate
from tests.api.test_quotas import Clock


def test_the_rate_is_measured() -> None:
    clock = Clock()
    drain = DrainRate(clock)
    for _ in range(10):
        clock.now_s += 4
        drain.ended()
    assert drain.time_for(1) == pytest.approx(4)
    assert drain.time_for(5) == pytest.approx(20)
    clock.now_s += 40  # nothing went: it has become half as fast
    assert drain.time_for(5) == pytest.approx(40)


def test_old_departures_are_forgotten() -> None:
    clock = Clock()
    drain = DrainRate(clock)
    for _ in range(NUM_REMEMBERED):
        clock.now_s += 100
        drain.ended()
    for _ in range(NUM_REMEMBERED):
        clock.now_s += 2
        drain.ended()
    assert drain.time_for(10) == pytest.approx(20)


def test_before_anything_went_it_is_as_long_as_that_has_been_so() -> None:
    clock = Clock()
    drain = DrainRate(clock)
    assert drain.time_for(3) == 1
    clock.now_s += 7
    assert drain.time_for(3) == 7
    clock.now_s += 10_000
    assert drain.time_for(3) == LONGEST_WAIT_S


def test_idle_time_does_not_count() -> None:
    clock = Clock()
    backlog = Backlog(clock)
    backlog.add(1, 100)
    backlog.ended(1)
    clock.now_s += 5000
    backlog.add(2, 100)
    backlog.add(3, 100)
    clock.now_s += 3
    backlog.ended(2)
    assert backlog.time_for_requests(2) == pytest.approx(6)
    assert backlog.time_for_tokens(50) == pytest.approx(1.5)


def test_tokens_wait_until_the_first_step() -> None:
    backlog = Backlog(Clock())
    backlog.add(1, 100)
    backlog.add(2, 50)
    assert backlog.num_waiting_tokens == 150
    backlog.started(1)
    backlog.started(1)
    assert backlog.num_waiting_tokens == 50
    backlog.ended(2)
    backlog.ended(1)
    assert backlog.num_waiting_tokens == 0
