"""Prompts beside running streams: how long they may make a step."""

from __future__ import annotations

from service.engine.blocks import BlockPool
from service.engine.pace import FEWEST_TOKENS, PromptPace
from service.engine.scheduler import Limits, Scheduler
from tests.engine.test_scheduler import make_sequence


def test_nothing_known_is_no_bound() -> None:
    pace = PromptPace(2.5)
    assert pace.prompt_tokens is None
    pace.stepped(1.0, 0, 1000)
    assert pace.prompt_tokens is None, "no decode was seen"


def test_the_bound_is_what_the_measured_costs_allow() -> None:
    pace = PromptPace(2.5)
    pace.stepped(1.0, 0, 2000)  # 0.5 ms a token, 1 ms beside others
    pace.stepped(0.1, 8, 0)
    assert pace.prompt_tokens == 150  # 0.1 s and 1.5 x 0.1 s
    pace.stepped(0.4, 8, 150)  # it turns out to be 2 ms a token
    assert pace.prompt_tokens == 75
    for _ in range(20):
        pace.stepped(0.25, 8, 150)
    assert pace.prompt_tokens == 150


def test_there_is_always_room_for_some() -> None:
    pace = PromptPace(1.0)
    pace.stepped(1.0, 0, 100)
    pace.stepped(0.001, 8, 0)
    assert pace.prompt_tokens == FEWEST_TOKENS


def test_zero_does_not_bound() -> None:
    pace = PromptPace(0.0)
    pace.stepped(1.0, 0, 1000)
    pace.stepped(0.1, 8, 0)
    assert pace.prompt_tokens is None


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
