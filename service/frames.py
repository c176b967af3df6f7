"""Messages on a stream of bytes, each after its length in four bytes: between the API process and
the engine, the engine and its ranks, the API process and its template worker.
"""

from __future__ import annotations

import struct
from typing import IO

LENGTH = struct.Struct("=I")


class FrameTooLongError(ValueError):
    """A frame says that it is longer than the reader takes."""


def frame(data: bytes) -> bytes:
    """A message with its length before it."""
    return LENGTH.pack(len(data)) + data


def read_frame(stream: IO[bytes]) -> bytes | None:
    """Wait for the next message; None when the stream ends, be it amid one."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    data = stream.read(length)
    return data if len(data) == length else None


class FrameReader:
    """Cuts what comes in pieces of any length into messages."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` of one message; a longer one is refused before its bytes are collected."""
        self._max_bytes = max_bytes
        self._rest = b""  # the beginning of a message
        self._pieces: list[bytes] = []  # that follow it
        self._missing = LENGTH.size  # bytes, until it is worth looking again

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are whole now. Raises `FrameTooLongError`."""
        self._missing -= len(data)
        if self._missing > 0:
            # A long message is joined once, not once for each of its pieces.
            self._pieces.append(data)
            return []
        if self._rest or self._pieces:
            data = b"".join((self._rest, *self._pieces, data))
            self._pieces.clear()
        messages: list[bytes] = []
        begin, end = 0, len(data)
        while end - begin >= LENGTH.size:
            (length,) = LENGTH.unpack_from(data, begin)
            if length > self._max_bytes:
                raise FrameTooLongError(
                    f"a message of {length:,} bytes is on its way; the limit is {self._max_bytes:,}"
                )
            after = begin + LENGTH.size + length
            if after > end:
                self._rest, self._missing = data[begin:], after - end
                return messages
            messages.append(data[begin + LENGTH.size : after])
            begin = after
        self._rest, self._missing = data[begin:], LENGTH.size - (end - begin)
        return messages
