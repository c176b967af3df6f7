"""Requests that come together begin together.

The API takes a third of a millisecond to admit a request. Of many that came at once the engine
would run the first alone, then the next few, in steps of hardly less time than one for all, and on
the cores that the API needs to admit the others. So a step waits a moment for the next of a burst.
"""

from __future__ import annotations

import time
from collections.abc import Callable

CLOSE_S = 0.004  # two requests no further apart belong together
WAIT_MS = 3  # for the next one
LONGEST_S = 0.03  # of a burst; from then on nothing waits for more of it


class Burst:
    """What came lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_at = self._last_at = -CLOSE_S
        self._count = 0

    def arrived(self) -> None:
        """A request came."""
        now = self._clock()
        if now - self._last_at > CLOSE_S:
            self._began_at, self._count = now, 0
        self._last_at = now
        self._count += 1

    def wait_ms(self, num_running: int) -> int:
        """How long to wait for another before the next step. Not after a single one, and not where
        more sequences run than came: they would wait for the sake of fewer."""
        is_over = self._clock() - self._began_at > LONGEST_S
        return 0 if is_over or self._count < 2 or num_running > self._count else WAIT_MS
