"""The explanations in flight, and which one the engine is given: one at a time, in the order in
which they came. The others wait here.

When an engine dies, the explanation that it was given begins anew on the next one. Two engines
that die computing the same one are enough: it ends with an error. Killed from outside, it takes
six, as for sequences (`in_flight.py`). Sequences are not held to account for it, nor it for them:
the flight recorder says who was computed.

Plain and synchronous: processes and sockets are in `supervisor.py`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from service.backlog import DrainRate
from service.engine.explain_messages import (
    EndExplain,
    Explain,
    Explained,
    ExplainPart,
    ExplainWish,
    LensRow,
    recorded_id,
)
from service.engine.messages import ToEngine
from service.in_flight import MAX_KILLS, NOT_KNOWN, Loss

MAX_DEATHS = 2


@dataclass(slots=True, eq=False)
class Explanation:
    """One that was accepted. Whoever made it calls `close` at the end, whatever happened."""

    id: int
    token_ids: list[int]
    wish: ExplainWish
    result: asyncio.Future[Explained]  # with `refusal` or `error` when there is none
    _drop: Callable[[Explanation], None]
    attention: list[bytes] = field(default_factory=list)  # parts of its JSON
    lens: list[LensRow] = field(default_factory=list)
    arrived_at: float = field(default_factory=monotonic)
    started_at: float | None = None  # given to an engine, the first time
    deaths: int = 0  # of engines that were computing it
    kills: int = 0  # the same, killed from outside

    @property
    def queue_s(self) -> float:
        """How long it waited for its turn."""
        return (self.started_at or monotonic()) - self.arrived_at

    def take_part(self, part: ExplainPart) -> None:
        """Keep what came of its answer."""
        if part.attention:
            self.attention.append(part.attention)
        self.lens += part.lens

    def forget_parts(self) -> None:
        """They will come again, or nobody wants them."""
        self.attention.clear()
        self.lens.clear()

    def close(self) -> None:
        """Nobody waits for it any more, and its place is free. A second time does nothing."""
        self._drop(self)


class Explanations:
    """All that were accepted and whose answers are not out yet.

    `send` gives a message to the engine that runs now; it is called only between
    `engine_ready` and `engine_lost`.
    """

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self.nothing = asyncio.Event()  # set while none waits for the engine
        self.nothing.set()
        self._send = send
        self._has_engine = False
        self._ids = itertools.count(1)
        self._waiting: deque[Explanation] = deque()
        self._running: Explanation | None = None
        self._open: set[Explanation] = set()  # these two, and those whose answer is on its way
        self._ends = DrainRate()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def num_unanswered(self) -> int:
        """Those that the engine has work with."""
        return len(self._waiting) + (self._running is not None)

    def add(self, token_ids: list[int], wish: ExplainWish) -> Explanation:
        """Accept this one; needs a running event loop."""
        result: asyncio.Future[Explained] = asyncio.get_running_loop().create_future()
        one = Explanation(next(self._ids), token_ids, wish, result, self._close)
        if not self._open:
            self._ends.begin()
        self._open.add(one)
        self._waiting.append(one)
        self.nothing.clear()
        self._send_next()
        return one

    def time_for(self, count: int) -> float:
        """Seconds until `count` more have ended, at the rate measured."""
        return self._ends.time_for(count)

    def end_all(self, error: Exception) -> None:
        """End those that have no answer yet, from this side; `error` is what they come to."""
        unanswered = [*self._waiting, *([] if self._running is None else [self._running])]
        for one in unanswered:
            self._withdraw(one)
            one.result.set_exception(error)

    def engine_ready(self) -> None:
        """There is an engine, and it has nothing yet."""
        self._has_engine = True
        self._send_next()

    def engine_lost(self, loss: Loss = NOT_KNOWN) -> None:
        """The engine died. What it had of an explanation is lost: it is the first in the queue
        again, unless too many engines died of it."""
        self._has_engine = False
        one, self._running = self._running, None
        if one is None:
            return
        one.forget_parts()
        self._waiting.appendleft(one)
        if loss.ids_in_step and recorded_id(one.id) not in loss.ids_in_step:
            return
        if loss.is_from_outside:
            one.kills += 1
        else:
            one.deaths += 1
        if one.deaths >= MAX_DEATHS or one.kills >= MAX_KILLS:
            words = f"{one.deaths + one.kills} engines died while they computed this explanation"
            self._withdraw(one)
            one.result.set_result(Explained(one.id, error=words))

    def take_part(self, part: ExplainPart) -> None:
        """Keep a piece of the answer; pieces of one that was ended meanwhile are dropped."""
        if self._running is not None and part.id == self._running.id:
            self._running.take_part(part)

    def take_answer(self, answer: Explained) -> None:
        """The engine is done with one."""
        one = self._running
        if one is not None and answer.id == one.id:
            self._running = None
            one.result.set_result(answer)
            self._send_next()

    def _close(self, one: Explanation) -> None:
        if one not in self._open:
            return
        self._open.discard(one)
        self._ends.ended()
        one.forget_parts()
        self._withdraw(one)
        if one.result.done() and not one.result.cancelled():
            one.result.exception()  # looked at, or asyncio says that nobody did
        one.result.cancel()

    def _withdraw(self, one: Explanation) -> None:
        """Take it from the engine, or from the queue."""
        if one is self._running:
            self._running = None
            if self._has_engine:
                self._send(EndExplain(one.id))
        elif one in self._waiting:
            self._waiting.remove(one)
        self._send_next()

    def _send_next(self) -> None:
        if self._has_engine and self._running is None and self._waiting:
            one = self._running = self._waiting.popleft()
            one.started_at = one.started_at or monotonic()
            self._send(Explain(one.id, one.token_ids, one.wish))
        if not self.num_unanswered:
            self.nothing.set()
