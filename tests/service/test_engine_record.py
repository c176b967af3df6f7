"""The books of all engines: phases, parts, the roofline, and counters that outlive a process."""

from __future__ import annotations

import pytest

from service.engine.messages import EngineStats, Measured, StepRecord
from service.engine_record import EngineRecord


def test_a_step_goes_into_its_phase() -> None:
    record = EngineRecord()
    record.stepped(StepRecord(4, 4, 4, 0.002))
    record.stepped(StepRecord(2, 0, 100, 0.05))
    record.stepped(StepRecord(3, 2, 66, 0.01))
    sums = {
        name: (phase.step_s.total, phase.sequences.total, phase.tokens.total)
        for name, phase in record.phases.items()
    }
    assert sums == {"decode": (0.002, 4, 4), "prefill": (0.05, 2, 100), "mixed": (0.01, 3, 66)}


def test_parts_add_up_to_the_step() -> None:
    record = EngineRecord()
    record.stepped(StepRecord(1, 1, 1, 1.0, 0.125, 0.25, 0.25, 0.125))
    assert sum(record.parts_s.values()) == 1.0
    assert record.parts_s["book"] == 0.25


def test_least_time_is_that_of_the_slower_of_two_and_counted_once_a_roof_is_known() -> None:
    record = EngineRecord()
    step = StepRecord(1, 1, 1, 1.0, num_bytes=40.0, flops=100.0)
    record.stepped(step)
    assert record.phases["decode"].least_s == 0
    record.roofline = Measured(read_bytes_per_s=80.0, flops_per_s=1000.0)
    record.stepped(step)
    assert record.phases["decode"].least_s == pytest.approx(0.5)
    assert (record.phases["decode"].num_bytes, record.phases["decode"].flops) == (80.0, 200.0)


def test_counters_go_on_when_an_engine_is_replaced() -> None:
    record = EngineRecord()
    record.lost(EngineStats(steps=7, preemptions=1, cache_queries=10, cache_hits=4))
    assert record.totals(EngineStats())["steps"] == 7
    totals = record.totals(EngineStats(steps=2, cache_queries=1))
    assert (totals["steps"], totals["preemptions"], totals["cache_queries"]) == (9, 1, 11)
