"""A step waits for the rest of a burst, and for nobody else."""

from __future__ import annotations

from service.engine.burst import LONGEST_S, WAIT_MS, Burst
from tests.api.test_quotas import Clock


def test_one_request_waits_for_nobody() -> None:
    clock = Clock()
    burst = Burst(clock)
    assert burst.wait_ms(0) == 0
    for _ in range(10):
        burst.arrived()
        assert burst.wait_ms(0) == 0
        clock.now_s += 0.01


def test_the_second_of_a_burst_waits_for_a_third() -> None:
    clock = Clock()
    burst = Burst(clock)
    burst.arrived()
    clock.now_s += 0.002
    burst.arrived()
    assert burst.wait_ms(0) == WAIT_MS
    assert burst.wait_ms(2) == WAIT_MS, "those that run are of the burst"
    assert burst.wait_ms(3) == 0, "three would wait for the sake of two"


def test_a_burst_without_end_is_not_waited_for() -> None:
    clock = Clock()
    burst = Burst(clock)
    waited_s = 0.0
    for _ in range(1000):
        burst.arrived()
        waited_s += min(burst.wait_ms(0) / 1000, 0.001)  # until the next
        clock.now_s += 0.001
    assert 0.02 <= waited_s <= LONGEST_S + 0.001


def test_after_a_pause_another_burst_begins() -> None:
    clock = Clock()
    burst = Burst(clock)
    for _ in range(50):
        burst.arrived()
        clock.now_s += 0.001
    assert burst.wait_ms(0) == 0
    clock.now_s += 0.01
    burst.arrived()
    assert burst.wait_ms(0) == 0
    burst.arrived()
    assert burst.wait_ms(0) == WAIT_MS
