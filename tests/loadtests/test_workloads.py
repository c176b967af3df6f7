"""What users send and when."""

from __future__ import annotations

import argparse
import random
import statistics
from itertools import islice

import pytest

from loadtests.load.patterns import tick_at
from loadtests.load.workloads import KINDS, Kind, Lengths, Wish, messages, wishes

LENGTHS = Lengths(prompt=50, output=30, shared=40, turns=3)


def some(kind: Kind, count: int, context: int = 512, lengths: Lengths = LENGTHS) -> list[Wish]:
    return [*islice(wishes(kind, lengths, 1000, context, random.Random(1), seed=7), count)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_wish_fits_the_context_and_the_vocabulary(kind: Kind) -> None:
    for wish in some(kind, 300, context=200):
        assert len(wish.prompt) >= 1
        assert wish.max_tokens >= 1
        assert len(wish.prompt) + wish.max_tokens <= 200
        assert all(0 <= token < 1000 for token in wish.prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_is_the_same_load(kind: Kind) -> None:
    assert some(kind, 5) == some(kind, 5)


def test_mixed_lengths_have_a_long_tail() -> None:
    lengths = [len(wish.prompt) for wish in some("mixed", 2000, context=100_000)]
    assert 45 <= statistics.median(lengths) <= 55
    # exp(1.2816 * 0.8) = 2.79 times the median at the ninth decile
    assert 2.5 <= statistics.quantiles(lengths, n=10)[-1] / 50 <= 3.1


def test_a_shared_prompt_is_shared_by_all_users() -> None:
    first = some("shared", 2)
    other = [*islice(wishes("shared", LENGTHS, 1000, 512, random.Random(2), seed=7), 1)]
    systems = {wish.prompt[:40] for wish in first + other}
    assert len(systems) == 1
    assert len({wish.prompt[40:] for wish in first + other}) == 3


def test_a_turn_brings_the_whole_chat_again() -> None:
    one, two, three, again = some("chat", 4)
    assert two.prompt[: len(one.prompt)] == one.prompt
    assert three.prompt[: len(two.prompt)] == two.prompt
    assert [len(wish.prompt) for wish in (one, two, three)] == [50, 130, 210]
    assert len(again.prompt) == 50
    assert len(messages(LENGTHS, random.Random(0)).split()) == 50


def options(**changes: object) -> argparse.Namespace:
    given = {
        "pattern": "constant",
        "run_time": 60,
        "step_users": "1,4",
        "step_s": 10.0,
        "burst_users": 64,
        "burst_s": 5.0,
        "burst_every_s": 20.0,
        "dispatchers": 2,
    }
    return argparse.Namespace(**given | changes)


@pytest.mark.parametrize(
    ("pattern", "now_s", "wanted"),
    [
        ("constant", 0, (8, 3)),
        ("constant", 60, None),
        ("soak", 59, (8, 3)),
        ("steps", 9.9, (1, 1000)),
        ("steps", 10, (4, 1000)),
        ("steps", 20, None),
        ("burst", 14.9, (8, 1000)),
        ("burst", 15, (72, 1000)),
        ("burst", 20, (8, 1000)),
        ("poisson", 30, (2, 1000)),
    ],
)
def test_patterns(pattern: str, now_s: float, wanted: tuple[int, float] | None) -> None:
    assert tick_at(options(pattern=pattern), now_s, 8, 3.0) == wanted


def test_a_run_without_an_end_goes_on() -> None:
    assert tick_at(options(run_time=None), 1e6, 8, 3.0) == (8, 3.0)
