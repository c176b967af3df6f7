"""Signals that come before there is a server to handle them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class EarlySignals:
    """Keeps SIGTERM and Ctrl-C from killing the process half-started: they are remembered,
    and forwarded once there is someone to end things in order."""

    def __init__(self) -> None:
        self.received = False
        self.forward: Callable[[int, FrameType | None], None] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self.forward is not None:
            self.forward(number, frame)
