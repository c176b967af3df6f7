"""The server's connections: how much may wait in one, and which are closed from our side.

What a client has not taken lies in the kernel's send buffer (`SEND_BUFFER_BYTES`; Linux reserves
twice that), and behind it in the transport's, up to 64 KiB and one chunk. Behind that, `send`
waits, a stream's next event is not made, and tokens wait in the journal. A client that takes
nothing of what waits, here or in the kernel, for `--slow-reader-s` is taken for dead.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import resource
import socket
import struct
import sys
import termios
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from service.api.sse import SLOW_READER

log = logging.getLogger("vitrine")

SEND_BUFFER_BYTES = 128 * 1024
CHECK_S = 0.5
OPEN_FILES = 65_536
_TCP_INFO_BYTES = 128
_BYTES_ACKED_AT = 120  # in struct tcp_info of linux/tcp.h


class Cycle(Protocol):
    """A request of a connection, as uvicorn has it."""

    scope: Any


class Connection(Protocol):
    """A connection, as uvicorn has it."""

    transport: asyncio.WriteTransport
    cycle: Cycle | None  # the latest request; None before the first


@dataclass(frozen=True, slots=True)
class Backlog:
    """What a client has not taken."""

    num_bytes: int
    num_acked: int  # bytes it took since the connection began; 0 where the kernel does not say
    since_s: float = 0.0  # when it last took something, on the event loop's clock

    def goes_on_from(self, before: Backlog) -> bool:
        """Whether something was taken since `before`."""
        return self.num_acked > before.num_acked or self.num_bytes < before.num_bytes


def backlog_of(connection: Connection, now_s: float) -> Backlog:
    """Bytes in the transport and, on Linux, in the kernel (tcp(7): SIOCOUTQ, and tcpi_bytes_acked
    of struct tcp_info); elsewhere the kernel's share is not seen."""
    num_bytes, num_acked = connection.transport.get_write_buffer_size(), 0
    sock = connection.transport.get_extra_info("socket")
    if sys.platform == "linux" and sock.fileno() >= 0:
        queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        num_bytes += struct.unpack("i", queued)[0]
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        num_acked = struct.unpack_from("Q", info, _BYTES_ACKED_AT)[0]
    return Backlog(num_bytes, num_acked, now_s)


class SlowReaders:
    """Finds connections whose clients take nothing, and closes them."""

    def __init__(self, on_cut: Callable[[], None]) -> None:
        """`on_cut` is called for each that is closed."""
        self._on_cut = on_cut
        self._backlogs: dict[Connection, Backlog] = {}

    def check(self, connections: Iterable[Connection], now_s: float, limit_s: float) -> None:
        """Close every connection that has taken nothing for `limit_s`; to be called often, with
        all that are open."""
        backlogs = {}
        for connection in connections:
            now = backlog_of(connection, now_s)
            if now.num_bytes == 0:
                continue
            before = self._backlogs.get(connection)
            if before is not None and not now.goes_on_from(before):
                now = replace(now, since_s=before.since_s)
            if now_s - now.since_s < limit_s:
                backlogs[connection] = now
                continue
            log.info("closed a connection: none of %d bytes taken in %g s", now.num_bytes, limit_s)
            cut(connection)
            self._on_cut()
        self._backlogs = backlogs


def cut(connection: Connection) -> None:
    """Close it without waiting for what it has not taken; its request hears of a disconnect."""
    if connection.cycle is not None:
        connection.cycle.scope[SLOW_READER] = True
    # Reset it: the kernel would go on offering its own share to someone who does not take it.
    sock = connection.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
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
