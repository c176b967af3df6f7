"""How much waits, and how fast it goes away: what a refused client is told to wait.

Plain arithmetic on a clock; knows nothing of HTTP, sockets or engines.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

NUM_REMEMBERED = 64
LONGEST_WAIT_S = 600.0
SHORTEST_WAIT_S = 1.0


class DrainRate:
    """How fast something goes away, measured over the last departures of a busy time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s = clock()
        self._departures: deque[tuple[float, float]] = deque()  # when, how much

    def begin(self) -> None:
        """There was nothing, and now there is: idle time says nothing of the speed."""
        self._since_s = self._clock()
        self._departures.clear()

    def ended(self, amount: float = 1.0) -> None:
        """So much has gone."""
        self._departures.append((self._clock(), amount))
        if len(self._departures) > NUM_REMEMBERED:
            self._since_s, _ = self._departures.popleft()

    def time_for(self, amount: float) -> float:
        """Seconds until `amount` more is gone at the rate seen, 1 .. 600. When nothing has gone
        yet, as long as that has been so."""
        elapsed_s = self._clock() - self._since_s
        gone = sum(one for _, one in self._departures)
        wait_s = amount * elapsed_s / gone if gone else elapsed_s
        return min(LONGEST_WAIT_S, max(SHORTEST_WAIT_S, wait_s))


class Backlog:
    """What was admitted and not ended, in requests, and in tokens of those that wait for their
    first. A request counts as its prompt and max_tokens."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._requests = DrainRate(clock)
        self._tokens = DrainRate(clock)
        self._waiting: dict[int, int] = {}  # id -> tokens, of those without a first token
        self._num_requests = 0
        self.num_waiting_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their first token."""
        return len(self._waiting)

    def add(self, id_: int, num_tokens: int) -> None:
        """A request was admitted."""
        if self._num_requests == 0:
            self._requests.begin()
        if not self._waiting:
            self._tokens.begin()
        self._num_requests += 1
        self._waiting[id_] = num_tokens
        self.num_waiting_tokens += num_tokens

    def started(self, id_: int) -> None:
        """Its first token came, or it ended without. A second time does nothing."""
        num_tokens = self._waiting.pop(id_, None)
        if num_tokens is not None:
            self.num_waiting_tokens -= num_tokens
            self._tokens.ended(num_tokens)

    def ended(self, id_: int) -> None:
        """It ended, by whatever way."""
        self.started(id_)
        self._num_requests -= 1
        self._requests.ended()

    def time_for_requests(self, count: int) -> float:
        """Seconds until `count` requests more have ended, at the rate measured."""
        return self._requests.time_for(count)

    def time_for_tokens(self, num_tokens: int) -> float:
        """Seconds until so many waiting tokens more have left the queue, at the rate measured."""
        return self._tokens.time_for(num_tokens)
