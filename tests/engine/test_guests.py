"""The guest between the steps: when its pieces may run, and that it comes to one end."""

from __future__ import annotations

import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from service.engine import guest_pace, recorder
from service.engine.explain_messages import (
    Explain,
    Explained,
    ExplainPart,
    ExplainWish,
    recorded_id,
)
from service.engine.guest_pace import RARE, SHARE, GuestPace
from service.engine.guests import ExplainRefusedError, Guests

WISH = ExplainWish(
    layers=[0], heads=[0], attention="none", top_k=1, lens=0, lens_positions=[0], candidates=1
)
STEP_S, PIECE_S = 0.010, 0.0005


def fed(pace: GuestPace, gaps_s: list[float]) -> GuestPace:
    for gap_s in gaps_s:
        pace.stepped(gap_s)
    return pace


def uneven(count: int) -> list[float]:
    """Gaps of which one in sixteen is 1.3 times as long as the others."""
    return [STEP_S * (1.3 if i % 16 == 0 else 1.0) for i in range(count)]


def simulate(pace: GuestPace, gaps_s: list[float], piece_s: float) -> list[float]:
    """Run pieces whenever the pace allows; the gaps as streams then see them."""
    seen = []
    for gap_s in gaps_s:
        guest_s = 0.0
        while pace.allows_piece:
            pace.worked(piece_s)
            guest_s += piece_s
        seen.append(gap_s + guest_s)
        pace.stepped(gap_s + guest_s)
    return seen


def tailed(count: int) -> list[float]:
    """Gaps as a crowded machine has them: one in fifty is up to six times as long."""
    rng = random.Random(5)
    return [
        STEP_S * (rng.uniform(1.0, 1.2) + (rng.random() < 0.02) * rng.uniform(0, 5))
        for _ in range(count)
    ]


GAPS = {"uneven": uneven(30000), "even": [STEP_S] * 30000, "tailed": tailed(30000)}


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


@pytest.mark.parametrize("piece_s", [PIECE_S, 0.002, 0.004, 0.05])
@pytest.mark.parametrize("gaps_s", GAPS.values(), ids=GAPS)
def test_no_gap_of_many_grows_and_the_guest_gets_on(gaps_s: list[float], piece_s: float) -> None:
    pace = fed(GuestPace(), gaps_s[:200])
    pace.learn(piece_s)
    seen = simulate(pace, gaps_s, piece_s)
    guest_s = sum(seen) - sum(gaps_s)
    assert p99(seen) <= 1.1 * p99(gaps_s)
    # The pace's own law, whatever the percentile: it may not take more than its share.
    assert guest_s <= SHARE * sum(seen) + guest_pace.MOST_CREDIT_S + piece_s
    assert guest_s >= (len(gaps_s) // RARE - 2) * piece_s


def test_small_pieces_take_their_whole_share_where_gaps_have_room() -> None:
    pace = fed(GuestPace(), uneven(200))
    pace.learn(PIECE_S)
    gaps_s = uneven(2000)
    guest_s = sum(simulate(pace, gaps_s, PIECE_S)) - sum(gaps_s)
    assert guest_s > 0.8 * SHARE * sum(gaps_s)


def test_an_unknown_piece_and_unknown_gaps_are_risked_once() -> None:
    pace = GuestPace()
    assert pace.allows_piece, "it would never get on"
    pace.worked(PIECE_S)
    for _ in range(guest_pace.FEWEST_GAPS - 2):
        assert not pace.allows_piece
        pace.stepped(STEP_S)
    fed(pace, [STEP_S] * 2)
    assert pace.allows_piece


def test_a_piece_as_long_as_a_step_waits_for_its_rare_turn() -> None:
    pace = fed(GuestPace(), [STEP_S] * RARE)
    pace.learn(STEP_S)
    assert pace.allows_piece
    num_pieces = 0
    while pace.allows_piece:  # the gap is spoilt: what was saved may go into it
        pace.worked(STEP_S)
        num_pieces += 1
    assert num_pieces == pytest.approx(guest_pace.MOST_CREDIT_S / STEP_S, abs=1)
    pace.stepped((1 + num_pieces) * STEP_S)
    for _ in range(RARE - 2):
        assert not pace.allows_piece
        pace.stepped(STEP_S)
    pace.stepped(STEP_S)
    assert pace.allows_piece


def test_one_interrupted_piece_does_not_close_the_door() -> None:
    pace = fed(GuestPace(), uneven(200))
    for _ in range(4):
        pace.learn(PIECE_S)
    pace.learn(1.0)
    assert pace.allows_piece


class Host:
    """Guests whose work is `script`, and what they sent."""

    def __init__(self, *script: object, pieces: int = 3) -> None:
        self.sent: list[ExplainPart | Explained] = []
        self.closed = 0
        self.script, self.pieces = script, pieces
        self.guests = Guests(self.begin, self.sent.append)

    def begin(self, request: Explain, send: Any) -> Generator[None, None, Explained]:
        def work() -> Generator[None, None, Explained]:
            try:
                for number in range(self.pieces):
                    yield
                    send(ExplainPart(request.id, attention=b"%d" % number))
                for error in self.script:
                    assert isinstance(error, Exception)
                    raise error
                return Explained(request.id, entropy=[[0.5]])
            finally:
                self.closed += 1

        return work()


def explain(number: int) -> Explain:
    return Explain(number, [1, 2], WISH)


def test_alone_it_runs_to_its_end() -> None:
    host = Host()
    host.guests.add(explain(7))
    assert host.guests.has_work
    host.guests.alone(is_wanted=lambda: False)
    assert not host.guests.has_work
    *parts, answer = host.sent
    assert parts == [ExplainPart(7, attention=b"%d" % n) for n in range(3)]
    assert isinstance(answer, Explained)
    assert answer.id == 7
    assert answer.entropy == [[0.5]]
    assert answer.compute_s > 0


def test_alone_it_gives_way_between_two_pieces() -> None:
    host = Host(pieces=1000)
    host.guests.add(explain(1))
    wanted = iter([False, False, True])
    host.guests.alone(is_wanted=lambda: next(wanted))
    assert len(host.sent) == 1
    assert host.guests.has_work


def test_beside_steps_it_gets_to_its_end() -> None:
    host = Host(pieces=4)
    host.guests.pace = fed(GuestPace(), uneven(200))
    host.guests.add(explain(1))
    for _ in range(RARE * 3):
        host.guests.after_step(is_last=False)
    assert not host.guests.has_work
    assert isinstance(host.sent[-1], Explained)


def test_after_the_last_step_nothing_runs_before_messages_are_read() -> None:
    host = Host()
    host.guests.pace = fed(GuestPace(), uneven(RARE * 2))
    host.guests.add(explain(1))
    host.guests.after_step(is_last=True)
    assert not host.sent
    assert host.guests.has_work


@pytest.mark.parametrize(
    ("error", "refusal", "words"),
    [
        (ExplainRefusedError("no such edge"), "no such edge", None),
        (RuntimeError("out of memory"), None, "RuntimeError: out of memory"),
    ],
)
def test_a_guest_that_fails_says_why(error: Exception, refusal: str, words: str) -> None:
    host = Host(error, pieces=0)
    host.guests.add(explain(3))
    host.guests.alone(is_wanted=lambda: False)
    (answer,) = host.sent
    assert isinstance(answer, Explained)
    assert (answer.id, answer.refusal, answer.error) == (3, refusal, words)
    assert not host.guests.has_work


def test_a_forgotten_guest_is_closed_and_says_nothing() -> None:
    host = Host()
    host.guests.add(explain(1))
    host.guests.alone(is_wanted=iter([False, True]).__next__)
    host.guests.forget(2)
    assert host.guests.has_work
    host.guests.forget(1)
    assert (host.guests.has_work, host.closed) == (False, 1)
    host.guests.alone(is_wanted=lambda: False)
    assert not host.sent


def test_there_is_room_for_one() -> None:
    host = Host()
    host.guests.add(explain(1))
    host.guests.add(explain(2))
    (answer,) = host.sent
    assert isinstance(answer, Explained)
    assert (answer.id, answer.error) == (2, "explanation 1 is being computed")
    lonely = Guests(None, host.sent.append)
    lonely.add(explain(3))
    assert host.sent[-1] == Explained(3, error="this engine explains nothing")


def test_a_guest_beside_a_step_under_way_hides_neither(tmp_path: Path) -> None:
    """On a device the next step computes while a guest's piece runs: a death then may be the
    doing of either."""
    recorder.create(tmp_path)
    record = recorder.Recorder(tmp_path)
    record.begin([5, 6])
    seen: list[frozenset[int]] = []

    def work(*_: Any) -> Generator[None, None, Explained]:
        seen.append(recorder.read(tmp_path))
        yield
        return Explained(3)

    guests = Guests(work, lambda _: None, record)
    guests.add(Explain(3, [1], WISH))
    guests.after_step(is_last=False)
    assert seen == [frozenset({5, 6, recorded_id(3)})]
    assert recorder.read(tmp_path) == {5, 6}, "the step goes on"
    record.begin([])
    guests.alone(is_wanted=lambda: False)
    assert recorder.read(tmp_path) == frozenset()
