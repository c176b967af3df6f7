"""A client down to its socket: thousands of them are cheap, and each may misbehave as it likes."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

Json = dict[str, object]


@dataclass(slots=True)
class Answer:
    """What came of a request; times are of `time.monotonic()`."""

    sent_s: float = 0.0
    answered_s: float = 0.0  # when the status line was there
    status: int = 0  # 0: no answer
    stamps: list[float] = field(default_factory=list)  # of token events
    finish_reason: str = ""  # of the last done event; "" for a stream that broke off


class RawClient:
    """One connection and the request on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.answer = Answer()

    @classmethod
    async def post(
        cls, url: str, body: Json, *, receive_bytes: int | None = None, reads: bool = True
    ) -> RawClient:
        """Connect and POST /generate. `receive_bytes` is the size of our receive buffer; one that
        does not `reads` takes nothing of the answer, and keeps the connection open."""
        parts = urlsplit(url)
        sock = socket.socket()
        sock.setblocking(False)
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
        client = cls(*await asyncio.open_connection(sock=sock))
        if not reads:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        data = json.dumps(body).encode()
        ending = "close" if reads else "keep-alive"
        client.answer.sent_s = time.monotonic()
        client.writer.write(
            f"POST /generate HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: {ending}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        return client

    async def read_head(self) -> int:
        """The status; 0 when the connection broke off before."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, OSError):
            return 0
        self.answer.answered_s = time.monotonic()
        self.answer.status = int(head.split(b" ", 2)[1])
        return self.answer.status

    async def events(self) -> AsyncIterator[tuple[str, bytes]]:
        """(event, data) as they come, to the end of the answer or of the connection."""
        rest = b""
        while (chunk := await self._chunk()) is not None:
            *events, rest = (rest + chunk).split(b"\n\n")
            for event in events:
                head, found, data = event.partition(b"\ndata: ")
                if found:
                    yield head.rpartition(b"event: ")[2].decode(), data

    async def read_all(self) -> Answer:
        """Read the answer to its end and book it."""
        if await self.read_head() == 200:
            async for event, data in self.events():
                if event == "token":
                    self.answer.stamps.append(time.monotonic())
                elif event == "done":
                    self.answer.finish_reason = json.loads(data)["finish_reason"]
        return self.answer

    async def _chunk(self) -> bytes | None:
        """One piece of a chunked body; None at its end, or when the connection broke off."""
        try:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
        except (asyncio.IncompleteReadError, OSError):
            return None
        return data[:-2] if size else None

    def close(self) -> None:
        """Hang up at once, with whatever is on its way."""
        self.writer.transport.abort()


def allow_files(count: int) -> None:
    """Let this process have `count` connections and some more. Raises `SystemExit`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 100
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise SystemExit(f"{count} connections need {wanted} open files; the limit is {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def gaps(answers: list[Answer], after_s: float = 0.0) -> list[float]:
    """Seconds between token events that came after `after_s`, of all streams."""
    return [
        late - early
        for answer in answers
        for early, late in zip(answer.stamps, answer.stamps[1:], strict=False)
        if early >= after_s
    ]
