"""The only place that frames server-sent events, and the response that sends them.

The framework's own streaming would leave a request running when its client stops reading and
then goes away. Here whoever ends first, the pump that sends or the watcher that waits for the
disconnect, ends the response, and `on_close` runs exactly once, whatever happened.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.disconnect import until_disconnect
from service.metrics import AbortReason

# A server that closes a connection because its client takes nothing sets this in the scope.
SLOW_READER = "vitrine.slow_reader"
# In the scope: the `send` that our own layers were given. They say nothing of the middle of a body,
# and there is an event for every token.
SERVER_SEND = "vitrine.server_send"
KEEP_ALIVE = b": keep-alive\n\n"
_NOT_IN_A_LINE = re.compile(r"[\r\n\0]")
_LINE_END = re.compile(rb"\r\n|\r|\n")


def format_event(event_id: str, event: str, data: bytes) -> bytes:
    """One event. Lines of `data` become data lines of their own; a client joins them with LF.

    Raises `ValueError` when the id or the name would break the line it stands on.
    """
    if _NOT_IN_A_LINE.search(event_id + event):
        raise ValueError(f"an event's id and name are one line each: {event_id!r}, {event!r}")
    return b"id: %b\nevent: %b\n%b" % (event_id.encode(), event.encode(), format_data(data))


def format_data(data: bytes) -> bytes:
    """An event without id and name, as OpenAI's streams have them; lines as in `format_event`."""
    if b"\n" in data or b"\r" in data:
        data = b"\ndata: ".join(_LINE_END.split(data))
    return b"data: %b\n\n" % data


class EventStreamResponse(Response):
    """Sends what `next_chunk` gives until it gives None.

    `next_chunk` is called again only when the last chunk is out: a slow client slows its own
    stream and nothing piles up here. It is cancelled when the client goes away. `on_close` is
    told why nobody reads any more; for an answer that is complete that means nothing.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        next_chunk: Callable[[], Awaitable[bytes | None]],
        on_close: Callable[[AbortReason], None],
        keep_alive_s: float,
    ) -> None:
        self._next_chunk = next_chunk
        self._on_close = on_close
        self._keep_alive_s = keep_alive_s
        self._clock = asyncio.get_running_loop().time
        self._last_sent_s = self._clock()
        self._sending = asyncio.Lock()
        self._complete = False
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send_middle: Send = scope.get(SERVER_SEND, send)
        tasks = [
            asyncio.create_task(self._pump(send, send_middle)),
            asyncio.create_task(until_disconnect(receive)),
            asyncio.create_task(self._keep_alive(send_middle)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._on_close("slow-reader" if scope.get(SLOW_READER) else "client-gone")
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            # A server may say by an OSError from `send` that the client is gone.
            if isinstance(end, Exception) and not isinstance(end, OSError):
                raise end

    async def _pump(self, send: Send, send_middle: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send(send, start)
        while (chunk := await self._next_chunk()) is not None:
            await self._send(
                send_middle, {"type": "http.response.body", "body": chunk, "more_body": True}
            )
        self._complete = True
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        """Say something whenever nothing was said for a while, so that proxies do not hang up."""
        while not self._complete:
            wait_s = self._last_sent_s + self._keep_alive_s - self._clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            elif self._sending.locked():  # a client that does not read needs no sign of life
                await asyncio.sleep(self._keep_alive_s)
            else:
                await self._send(
                    send, {"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True}
                )

    async def _send(self, send: Send, message: dict[str, object]) -> None:
        async with self._sending:
            await send(message)
            self._last_sent_s = self._clock()
