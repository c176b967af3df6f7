"""The API's end of the socket to one engine, on the event loop."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Protocol

from service.engine.messages import MAX_MESSAGE_BYTES
from service.frames import FrameReader, FrameTooLongError, frame

BUFFER_BYTES = 64 * 1024


class LinkListener(Protocol):
    """Who hears the engine."""

    def heard(self, message: bytes) -> None: ...

    def hung_up(self, error: str) -> None:
        """Nothing more will come; `error` says why if the engine broke the protocol. Called
        once, unless the link was closed from here."""
        ...


class EngineLink(asyncio.BufferedProtocol):
    """Messages to and from an engine process, as bytes."""

    _transport: asyncio.Transport

    def __init__(self, connected: socket.socket, listener: LinkListener) -> None:
        """Of `open` alone."""
        self._socket = connected
        self._listener = listener
        self._reader = FrameReader(MAX_MESSAGE_BYTES)
        self._is_open = True
        # Read into by asyncio, which without it makes 256 KiB of memory for every message.
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    @classmethod
    async def open(cls, connected: socket.socket, listener: LinkListener) -> EngineLink:
        """A link over a connected stream socket, which it closes."""
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(
            lambda: cls(connected, listener), sock=connected
        )
        return link

    def send(self, message: bytes) -> None:
        """Send, or keep until the engine reads; never waits."""
        if self._is_open:
            self._transport.write(frame(message))

    def close(self) -> None:
        """Hear nothing more. What was not sent yet is dropped."""
        self._is_open = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of the event loop, like those below."""
        self._transport = transport  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            messages = self._reader.feed(bytes(self._buffer[:nbytes]))
        except FrameTooLongError as error:
            self._end(str(error))
            return
        for message in messages:
            if self._is_open:
                self._listener.heard(message)

    def connection_lost(self, exc: Exception | None) -> None:
        # After a write that failed asyncio does not read what the engine had said before it died.
        with suppress(OSError):
            while self._is_open and (num_bytes := self._socket.recv_into(self._buffer)):
                self.buffer_updated(num_bytes)
        if self._is_open:
            self._end("")

    def _end(self, error: str) -> None:
        self.close()
        self._listener.hung_up(error)
