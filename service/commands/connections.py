"""The server's connections: how much may wait in one, and which are closed from our side.

What a client has not taken lies in the kernel's send buffer (`SEND_BUFFER_BYTES`; Linux reserves
twice that), and behind it in the transport's, up to 64 KiB and one chunk. Behind that, `send`
waits, a stream's next event is not made, and tokens wait in the journal. A client that takes
nothing of what waits in the transport for `--slow-reader-s` is taken for dead, or for worse.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from service.api.sse import SLOW_READER

log = logging.getLogger("vitrine")

SEND_BUFFER_BYTES = 128 * 1024
CHECK_S = 0.5
OPEN_FILES = 65_536


class Cycle(Protocol):
    """A request of a connection, as uvicorn has it."""

    scope: Any


class Connection(Protocol):
    """A connection, as uvicorn has it."""

    transport: asyncio.WriteTransport
    cycle: Cycle | None  # the latest request; None before the first


class SlowReaders:
    """Finds connections whose clients take nothing, and closes them."""

    def __init__(self, on_cut: Callable[[], None]) -> None:
        """`on_cut` is called for each that is closed."""
        self._on_cut = on_cut
        # Bytes that wait, and since when none of them was taken (the event loop's clock).
        self._waiting: dict[Connection, tuple[int, float]] = {}

    def check(self, connections: Iterable[Connection], now_s: float, limit_s: float) -> None:
        """Close every connection that has taken nothing for `limit_s`; to be called often, with
        all that are open."""
        waiting = {}
        for connection in connections:
            num_bytes = connection.transport.get_write_buffer_size()
            if num_bytes == 0:
                continue
            before, since_s = self._waiting.get(connection, (num_bytes, now_s))
            if num_bytes < before:
                since_s = now_s
            if now_s - since_s < limit_s:
                waiting[connection] = (num_bytes, since_s)
                continue
            log.info("closed a connection: nothing of %d bytes taken in %g s", num_bytes, limit_s)
            cut(connection)
            self._on_cut()
        self._waiting = waiting


def cut(connection: Connection) -> None:
    """Close it without waiting for what it has not taken; its request hears of a disconnect."""
    if connection.cycle is not None:
        connection.cycle.scope[SLOW_READER] = True
    connection.transport.abort()


def bound_send_buffers(listeners: Iterable[Any]) -> None:
    """Bound what the kernel holds for a client; accepted sockets inherit it from `listeners`
    (or from what asyncio shows of them)."""
    for listener in listeners:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def raise_file_limit() -> None:
    """Let this process have `OPEN_FILES` open, or as many as it may: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
