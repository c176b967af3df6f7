"""Prompts beside running streams: how long they may make a step."""

from __future__ import annotations

import pytest

from service.engine.blocks import BlockPool
from service.engine.pace import FEWEST_TOKENS, PromptPace
from service.engine.scheduler import PICKUP_S, SETTLED_TOKENS, Limits, Phases, Scheduler
from tests.engine.engines import make_core, random_model, submit
from tests.engine.test_scheduler import make_sequence


def among(num_decoding: int, num_starting: int) -> Phases:
    """All that write have done so for long."""
    return Phases(starting=num_starting, decoding=num_decoding, settled=num_decoding)


def test_nothing_known_is_no_bound() -> None:
    pace = PromptPace(2.5)
    assert pace.prompt_tokens(among(8, 1)) is None
    pace.stepped(1.0, 0, 1000)
    assert pace.prompt_tokens(among(8, 1)) is None, "no decode was seen"


def test_the_bound_is_what_the_measured_costs_allow() -> None:
    pace = PromptPace(2.5)
    pace.stepped(1.0, 0, 2000)  # 0.5 ms a token, 1 ms beside others
    pace.stepped(0.1, 8, 0)
    assert pace.prompt_tokens(among(8, 1)) == 150  # 0.1 s and 1.5 x 0.1 s
    pace.stepped(0.4, 8, 150)  # it turns out to be 2 ms a token
    assert pace.prompt_tokens(among(8, 1)) == 75
    for _ in range(20):
        pace.stepped(0.25, 8, 150)
    assert pace.prompt_tokens(among(8, 1)) == 150


def test_there_is_always_room_for_some() -> None:
    pace = PromptPace(1.0)
    pace.stepped(1.0, 0, 100)
    pace.stepped(0.001, 8, 0)
    assert pace.prompt_tokens(among(8, 1)) == FEWEST_TOKENS


def test_a_step_is_compared_with_as_many_decodes() -> None:
    """After a burst no step of decodes alone is seen for long: neither one stream's nor all
    streams' steps are the measure for those that write now."""
    pace = PromptPace(2.0)
    pace.stepped(1.0, 0, 2000)  # 1 ms a token beside others
    for _ in range(20):
        pace.stepped(0.01, 1, 0)
        pace.stepped(0.07, 31, 0)
    bounds = [pace.prompt_tokens(among(n, 1)) for n in (1, 11, 21, 31, 64)]
    assert bounds == [30, 30, 50, 70, 70]


def test_it_grows_where_many_wait_to_begin() -> None:
    pace = PromptPace(2.0)
    pace.stepped(1.0, 0, 2000)
    pace.stepped(0.1, 8, 0)
    assert [pace.prompt_tokens(among(8, n)) for n in (1, 4, 8, 32)] == [100, 100, 300, 1500]


def test_those_that_came_together_begin_together() -> None:
    pace = PromptPace(2.0)
    pace.stepped(1.0, 0, 2000)
    pace.stepped(0.1, 8, 0)
    assert pace.prompt_tokens(Phases(starting=1, decoding=8, settled=0)) is None
    assert pace.prompt_tokens(Phases(starting=1, decoding=8, settled=8)) == 100
    assert pace.prompt_tokens(Phases(starting=4, decoding=8, settled=1)) == 100, "it was there"


def step(scheduler: Scheduler) -> None:
    for item in scheduler.schedule():
        samples = item.samples
        scheduler.computed(scheduler.launched(item))
        if samples:
            item.sequence.token_ids.append(1)
            item.sequence.began_at = 1.0


def test_who_has_written_enough_does_not_wait_for_its_own_burst() -> None:
    scheduler = Scheduler(Limits(4, 512, 1024), BlockPool(64, 16))
    scheduler.add(make_sequence(0, [1] * 20, 50))
    step(scheduler)
    scheduler.add(make_sequence(1, [2] * 20, 50))
    [first], second = scheduler.running, scheduler.waiting[0]
    second.arrived_at = first.began_at + PICKUP_S
    for num_output in range(1, SETTLED_TOKENS):
        assert first.num_output == num_output
        assert scheduler.phases == Phases(starting=1, decoding=1, settled=0)
        first.num_computed += 1
        first.token_ids.append(1)
    assert scheduler.phases == Phases(starting=1, decoding=1, settled=1)


def test_who_writes_already_does_not_wait_for_a_burst() -> None:
    scheduler = Scheduler(Limits(4, 512, 1024), BlockPool(64, 16))
    scheduler.add(make_sequence(0, [1] * 20, 50))
    step(scheduler)
    late = make_sequence(1, [2] * 600, 50)
    late.arrived_at = scheduler.running[0].began_at + 1.01 * PICKUP_S
    scheduler.add(late)
    assert scheduler.phases == Phases(starting=1, decoding=1, settled=1)
    step(scheduler)
    assert late.num_computed == 511, "it is in the middle of its prompt now"
    assert scheduler.phases == Phases(starting=1, decoding=1, settled=1)


def test_whoever_comes_while_a_burst_begins_does_not_break_it_up() -> None:
    scheduler = Scheduler(Limits(4, 32, 1024), BlockPool(64, 16))
    for number in (0, 1):
        scheduler.add(make_sequence(number, [number + 1] * 20, 50))
    late = make_sequence(2, [3] * 40, 50)
    late.arrived_at = 2.0
    scheduler.add(late)
    step(scheduler)
    assert scheduler.phases == Phases(starting=2, decoding=1, settled=0)
    step(scheduler)
    assert scheduler.phases == Phases(starting=1, decoding=2, settled=2), "its turn comes"


def test_only_those_with_a_seat_wait_to_begin() -> None:
    scheduler = Scheduler(Limits(4, 512, 1024), BlockPool(64, 16))
    for number in range(9):
        scheduler.add(make_sequence(number, [1] * 20, 50))
    assert scheduler.phases == Phases(starting=4, decoding=0, settled=0)
    for item in scheduler.schedule():
        scheduler.computed(scheduler.launched(item))
        item.sequence.token_ids.append(1)
    assert scheduler.phases == Phases(starting=0, decoding=4, settled=4), "all seats are taken"
    scheduler.remove(scheduler.running[0])
    assert scheduler.phases == Phases(starting=1, decoding=3, settled=0)


def test_zero_does_not_bound() -> None:
    pace = PromptPace(0.0)
    pace.stepped(1.0, 0, 1000)
    pace.stepped(0.1, 8, 0)
    assert pace.prompt_tokens(among(8, 1)) is None


def test_the_bound_holds_beside_decodes_only() -> None:
    scheduler = Scheduler(Limits(8, 512, 1024), BlockPool(64, 16))
    scheduler.add(make_sequence(1, [1] * 300, 50))
    [whole] = scheduler.schedule(40)
    assert whole.num_tokens == 300, "nobody waits"
    scheduler.computed(scheduler.launched(whole))
    whole.sequence.token_ids.append(1)
    scheduler.add(make_sequence(2, [2] * 100, 50))
    scheduler.add(make_sequence(3, [3] * 100, 50))
    first = scheduler.schedule(40)
    assert [(item.sequence.id, item.num_tokens) for item in first] == [(1, 1), (2, 40)]
    for item in first:
        scheduler.computed(scheduler.launched(item))
    first[0].sequence.token_ids.append(1)
    second = scheduler.schedule(70)
    assert [(item.sequence.id, item.num_tokens) for item in second] == [(1, 1), (2, 60), (3, 10)]


def test_the_engine_takes_a_burst_whole_and_who_comes_later_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make_core(random_model(), max_batched_tokens=128)
    core.pace = PromptPace(2.0)
    core.pace.stepped(2.5, 0, 1000)  # 5 ms a token beside others
    core.pace.stepped(0.1, 2, 0)
    monkeypatch.setattr(core.pace, "stepped", lambda *_: None)
    core.add(submit(1, [1] * 30, max_tokens=50, ignore_eos=True))
    core.step()
    first = core.sequences[1]
    core.add(submit(2, [2] * 60, max_tokens=50, ignore_eos=True))
    core.sequences[2].arrived_at = first.began_at
    core.step()
    assert core.last_step.num_tokens == 1 + 60
    core.add(submit(3, [3] * 60, max_tokens=50, ignore_eos=True))
    core.sequences[3].arrived_at = first.began_at + 1.0
    core.step()
    assert core.last_step.num_tokens == 2 + 20
