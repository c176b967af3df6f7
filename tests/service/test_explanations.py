"""The explanations in flight: one at a time, each to one end, whatever happens to engines."""

from __future__ import annotations

import asyncio

import pytest

from service.engine.explain_messages import (
    EndExplain,
    Explain,
    Explained,
    ExplainPart,
    ExplainWish,
    LensRow,
    recorded_id,
)
from service.explanations import MAX_DEATHS, Explanation, Explanations
from service.in_flight import MAX_KILLS, Loss

WISH = ExplainWish(
    layers=[0], heads=[0], attention="none", top_k=1, lens=0, lens_positions=[0], candidates=1
)


class Desk:
    """Explanations, and what the engine was sent."""

    def __init__(self, *, has_engine: bool = True) -> None:
        self.sent: list[object] = []
        self.all = Explanations(self.sent.append)
        if has_engine:
            self.all.engine_ready()

    def add(self) -> Explanation:
        return self.all.add([1, 2, 3], WISH)

    def take_sent(self) -> list[object]:
        sent = [
            one.id if isinstance(one, Explain) else -one.id
            for one in self.sent
            if isinstance(one, Explain | EndExplain)
        ]
        self.sent.clear()
        return sent


async def test_one_at_a_time_in_the_order_in_which_they_came() -> None:
    desk = Desk()
    one, two, three = desk.add(), desk.add(), desk.add()
    assert desk.take_sent() == [one.id]
    desk.all.take_part(ExplainPart(one.id, attention=b"[[", lens=[LensRow(0, 1, [])]))
    desk.all.take_part(ExplainPart(two.id, attention=b"never sent"))
    desk.all.take_part(ExplainPart(one.id, attention=b"]]"))
    desk.all.take_answer(Explained(one.id))
    assert (one.attention, len(one.lens), two.attention) == ([b"[[", b"]]"], 1, [])
    assert (await one.result).id == one.id
    assert desk.take_sent() == [two.id]
    two.close()
    assert desk.take_sent() == [-two.id, three.id]
    desk.all.take_answer(Explained(two.id))  # it was on its way
    assert not three.result.done()
    assert len(desk.all) == 2, "an answer that is not out yet has its place"
    one.close()
    one.close()
    three.close()
    assert len(desk.all) == 0
    assert desk.all.nothing.is_set()


async def test_one_that_waits_and_goes_was_never_the_engine_s() -> None:
    desk = Desk()
    one, two = desk.add(), desk.add()
    two.close()
    desk.all.take_answer(Explained(one.id))
    assert desk.take_sent() == [one.id]
    assert two.result.cancelled()


async def test_it_begins_anew_on_the_next_engine() -> None:
    desk = Desk(has_engine=False)
    one, two = desk.add(), desk.add()
    assert desk.take_sent() == []
    desk.all.engine_ready()
    desk.all.take_part(ExplainPart(one.id, attention=b"half"))
    desk.all.engine_lost(Loss(frozenset({recorded_id(one.id)}), is_from_outside=True))
    assert not desk.all.nothing.is_set()
    desk.all.engine_ready()
    assert desk.take_sent() == [one.id, one.id]
    assert one.attention == []
    assert not two.result.done()


@pytest.mark.parametrize(("from_outside", "lives"), [(False, MAX_DEATHS), (True, MAX_KILLS)])
async def test_engines_do_not_die_of_one_for_ever(from_outside: bool, lives: int) -> None:
    desk = Desk()
    one, two = desk.add(), desk.add()
    for life in range(lives):
        assert not one.result.done(), life
        desk.all.engine_lost(Loss(frozenset({recorded_id(one.id)}), from_outside))
        desk.all.engine_ready()
    error = (await one.result).error
    assert error == f"{lives} engines died while they computed this explanation"
    assert desk.take_sent() == [one.id] * lives + [two.id]


async def test_it_is_not_held_to_account_for_sequences() -> None:
    desk = Desk()
    one = desk.add()
    for _ in range(10):
        desk.all.engine_lost(Loss(frozenset({one.id, 77}), is_from_outside=False))
        desk.all.engine_ready()
    assert not one.result.done()


async def test_the_server_can_end_them_all() -> None:
    desk = Desk()
    one, two, gone = desk.add(), desk.add(), desk.add()
    gone.close()
    desk.all.end_all(RuntimeError("the house is on fire"))
    for each in (one, two):
        with pytest.raises(RuntimeError, match="on fire"):
            await each.result
    assert desk.all.nothing.is_set()
    assert len(desk.all) == 2
    one.close()
    two.close()
    assert len(desk.all) == 0
    await asyncio.sleep(0)
