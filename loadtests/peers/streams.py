"""Many server-sent-event streams at once, read with as little work as the measuring allows:
the client shares the machine with the server it measures. Standard library only.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from urllib.parse import urlsplit

from loadtests.peers.work import PeerError

LIMIT_S = 600.0
EVENT_END = b"\n\n"
SO_TIMESTAMPNS = 35  # socket(7): a timespec beside what is received; Python has no name for it
TIMESPEC = struct.Struct("@ll")
STAMP_BYTES = socket.CMSG_SPACE(TIMESPEC.size)

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one event says: new token ids, or at the end the server's own count of tokens."""

    token_ids: tuple[int, ...] = ()
    num_unnamed: int = 0  # tokens the event carries without their ids
    total: int | None = None


@dataclass(slots=True)
class Stream:
    """What came of one request."""

    stamps: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    total: int | None = None
    ended: float = 0.0  # when its last event came


def read_all(
    url: str, bodies: list[Json], understand: Callable[[Json], Seen], look_every_s: float = 0.0
) -> tuple[float, list[Stream]]:
    """POST every body at once, on connections that are open; when that began, and what each
    stream brought.

    look_every_s: 0 reads each event as it comes. Longer, the client sleeps in between: it
        computes next to nothing, and the server's writes wake nobody up, as when the client is
        another machine. Stamps are the kernel's, of when bytes came (the last of those read at
        once); where it has none, of the reading.

    Raises `PeerError` for another answer than a whole stream, `TimeoutError` after ten minutes.
    """
    connections = [_connected(url) for _ in bodies]
    requests = [_request(url, body) for body in bodies]
    began = time.perf_counter()
    for connection, request in zip(connections, requests, strict=True):
        connection.sendall(request)
    offset_s = time.time() - time.perf_counter()
    answers = [Answer(connection, offset_s) for connection in connections]
    coming = {answer.connection.fileno(): answer for answer in answers}
    look = select.poll()
    for descriptor in coming:
        look.register(descriptor, select.POLLIN)
    while coming:
        if time.perf_counter() - began > LIMIT_S:
            raise TimeoutError(f"{len(coming)} of {len(bodies)} streams had no end in {LIMIT_S} s")
        time.sleep(look_every_s)
        for descriptor, _ in look.poll(1000):
            if not coming[descriptor].read():
                look.unregister(descriptor)
                coming.pop(descriptor).connection.close()
    return began, [_stream(url, answer, understand) for answer in answers]


@dataclass(slots=True)
class Answer:
    """The bytes of an answer and when they came. They are understood when all is over: who
    measures on the server's own cores computes nothing while it does."""

    connection: socket.socket
    clock_offset_s: float  # the kernel's clock over ours
    pieces: list[bytes] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)

    def read(self) -> bool:
        """What has come; False at the end."""
        piece, notes, _, _ = self.connection.recvmsg(1 << 16, STAMP_BYTES)
        came = time.perf_counter()
        for _, kind, data in notes:
            if kind == SO_TIMESTAMPNS:
                seconds, nanoseconds = TIMESPEC.unpack(data)
                came = seconds + nanoseconds / 1e9 - self.clock_offset_s
        # In order, whatever the two clocks say: a piece without a note is stamped when it is read.
        self.stamps.append(max(came, self.stamps[-1] if self.stamps else 0.0))
        self.pieces.append(piece)
        return bool(piece)


def _connected(url: str) -> socket.socket:
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=LIMIT_S)
    if sys.platform == "linux":
        connection.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    return connection


def _request(url: str, body: Json) -> bytes:
    parts = urlsplit(url)
    payload = json.dumps(body).encode()
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        "Content-Type: application/json\r\nAccept: text/event-stream\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + payload


def _stream(url: str, answer: Answer, understand: Callable[[Json], Seen]) -> Stream:
    """The events of a chunked body; one's time is that of the bytes that completed it."""
    raw = b"".join(answer.pieces)
    ends = list(accumulate(map(len, answer.pieces)))
    head, found, _ = raw.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0]
    if not found or status.split(b" ")[1] != b"200":
        raise PeerError(f"{url} answered {status.decode()!r}")
    stream = Stream()
    rest, at = b"", len(head) + 4
    while size := _chunk_size(url, raw, at):
        begin = raw.index(b"\r\n", at) + 2
        at = begin + size + 2
        now = answer.stamps[bisect_left(ends, min(at, len(raw)))]
        *events, rest = (rest + raw[begin : begin + size]).split(EVENT_END)
        for event in events:
            _, found, data = event.partition(b"data: ")
            if not found or data.startswith(b"[DONE]"):
                continue
            seen = understand(json.loads(data))
            stream.ended = now
            stream.token_ids += seen.token_ids
            stream.stamps += [now] * (len(seen.token_ids) + seen.num_unnamed)
            if seen.total is not None:
                stream.total = seen.total
    return stream


def _chunk_size(url: str, raw: bytes, at: int) -> int:
    """Bytes of the chunk that begins there; 0 for the last one."""
    line, found, _ = raw[at : at + 20].partition(b"\r\n")
    if not found:
        raise PeerError(f"{url} broke off after {at} bytes")
    return int(line, 16)
