"""Many server-sent-event streams at once, read with as little work as the measuring allows:
the client shares the machine with the server it measures. Standard library only.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from loadtests.peers.work import PeerError

LIMIT_S = 600.0
EVENT_END = b"\n\n"

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


async def read_all(
    url: str, bodies: list[Json], understand: Callable[[Json], Seen]
) -> tuple[float, list[Stream]]:
    """POST every body at once; when they were sent, and what each stream brought."""
    async with asyncio.timeout(LIMIT_S):
        began = time.perf_counter()
        streams = await asyncio.gather(*(_read_one(url, body, understand) for body in bodies))
    return began, streams


async def _read_one(url: str, body: Json, understand: Callable[[Json], Seen]) -> Stream:
    parts = urlsplit(url)
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\n"
            f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode()
            + payload
        )
        status, *_ = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)
        if status.split(b" ")[1] != b"200":
            raise PeerError(f"{url} answered {status.decode()}")
        return await _read_events(reader, understand)
    finally:
        writer.close()


async def _read_events(reader: asyncio.StreamReader, understand: Callable[[Json], Seen]) -> Stream:
    """Chunked body to events; an event's time is that of the chunk that completed it."""
    stream = Stream()
    rest = b""
    while size := int(await reader.readline(), 16):
        chunk = await reader.readexactly(size + 2)
        now = time.perf_counter()
        *events, rest = (rest + chunk[:-2]).split(EVENT_END)
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
