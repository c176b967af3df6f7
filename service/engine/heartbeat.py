"""The engine's sign of life from within long work."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.engine.messages import Progress

HEARTBEAT_S = 0.5


class Heartbeat:
    """Called between the layers of a step and the parts of loading by the thread that does
    the work, it says so to the API, at most every HEARTBEAT_S. Steps shorter than that send
    nothing: their output is sign enough."""

    def __init__(self, tell: Callable[[Progress], None]) -> None:
        self._tell = tell
        self._began_at = self._told_at = time.monotonic()

    def step_begins(self) -> None:
        """The API was told everything, now or a moment ago (outbox.py)."""
        self._began_at = self._told_at = time.monotonic()

    def __call__(self, step_tokens: int = 0) -> None:
        """`step_tokens` are computed by the step that runs; 0 while loading."""
        now = time.monotonic()
        if now - self._told_at >= HEARTBEAT_S:
            self._told_at = now
            self._tell(Progress(step_tokens, now - self._began_at))
