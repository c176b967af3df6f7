"""A client at the ASGI level, without sockets: it can stop reading and go away at will."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message

from tests.api.sse_parser import Event, EventStreamParser


class Exchange:
    """One request and what comes back."""

    def __init__(
        self,
        app: ASGIApp,
        body: Any = None,
        path: str = "/generate",
        headers: dict[str, str] | None = None,
        method: str = "POST",
    ) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", **(headers or {})}
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": data, "more_body": False})
        self._parser = EventStreamParser()
        self.may_send = asyncio.Event()  # cleared: the client does not read
        self.may_send.set()
        self.sends_waiting = 0
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []
        self.events: list[Event] = []
        self.task = asyncio.create_task(app(self._scope, self._inbox.get, self._send))  # type: ignore[arg-type]

    async def _send(self, message: Message) -> None:
        self.sends_waiting += 1
        await self.may_send.wait()
        self.sends_waiting -= 1
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.chunks.append(message.get("body", b""))
            self.events += self._parser.feed(self.chunks[-1])

    @property
    def comments(self) -> list[str]:
        return self._parser.comments

    def disconnect(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def until(self, condition: Any) -> None:
        """Wait until `condition()` is true; fails after a while."""
        for _ in range(2000):
            if condition():
                return
            await asyncio.sleep(0.002)
        raise TimeoutError(f"still not after 4 s; so far: {self.events}")

    async def until_events(self, count: int) -> list[Event]:
        await self.until(lambda: len(self.events) >= count)
        return self.events

    async def finish(self) -> list[Event]:
        async with asyncio.timeout(5):
            await self.task
        return self.events

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)
