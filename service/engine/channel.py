"""The engine's end of the socket to the API process.

The socket is one of a pair that has no name: nobody but the two processes can open it. The API
reads in its own time and a step must never wait for it, so what the system's buffer does not take
is kept here and goes out with the next message or look. That is bounded by what is in flight: one
small message a step.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque

from service.engine.messages import MAX_MESSAGE_BYTES
from service.frames import FrameReader, frame

_READ_BYTES = 256 * 1024


class ChannelClosedError(Exception):
    """The other side closed its end, or is gone."""


class Channel:
    """Messages to and from the API process, as bytes."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._reader = FrameReader(MAX_MESSAGE_BYTES)
        self._received: deque[bytes] = deque()
        self._unsent = bytearray()
        self._is_open = True
        self._poll = select.poll()
        self._wanted = select.POLLIN
        self._poll.register(connected, self._wanted)

    def poll(self, wait_ms: int) -> bool:
        """Whether a message is there, or becomes so within `wait_ms`. Raises
        `ChannelClosedError` when none will ever come, and `FrameTooLongError`."""
        if self._received:
            return True
        end = time.monotonic() + wait_ms / 1000 if wait_ms else 0.0
        while True:
            if self._unsent:
                self._flush()
            if self._poll.poll(wait_ms) and self._read():
                return True
            if wait_ms:
                wait_ms = max(0, round((end - time.monotonic()) * 1000))
            if not wait_ms:
                return False

    def receive(self) -> bytes:
        """The next message; waits for it. Raises as `poll` does."""
        while not self._received:
            self.poll(60_000)
        return self._received.popleft()

    def send(self, message: bytes) -> None:
        """Send or keep; never waits and never fails. That nobody hears any more is what `poll`
        tells."""
        self._unsent += frame(message)
        self._flush()

    def close(self, linger_s: float) -> None:
        """Give the last messages so long to leave."""
        end = time.monotonic() + linger_s
        writable = select.poll()  # not `select`, which takes no descriptor from 1024 on
        if self._unsent:
            writable.register(self._socket, select.POLLOUT)
        while self._unsent and self._is_open and (left := end - time.monotonic()) > 0:
            writable.poll(left * 1000)
            self._flush()
        self._socket.close()

    def _read(self) -> bool:
        """Take in what has come; whether a message is whole."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return bool(self._received)  # it became writable
        except ConnectionError as error:
            raise ChannelClosedError(str(error)) from None
        if not data:
            raise ChannelClosedError("the API process closed its end")
        self._received.extend(self._reader.feed(data))
        return bool(self._received)

    def _flush(self) -> None:
        try:
            while self._unsent and self._is_open:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._is_open = False
        if not self._is_open:
            self._unsent.clear()
        wanted = select.POLLIN | (select.POLLOUT if self._unsent else 0)
        if wanted != self._wanted:
            self._poll.modify(self._socket, wanted)
            self._wanted = wanted
