"""uvicorn's HTTP/1.1 connection, with the bounds it leaves open: how long and how large the head
of a request may be, and how many connections there are.

The parser (httptools) keeps collecting a header that never ends, and a connection that sends
nothing is kept for ever: each would let a stranger take memory or sockets for free. Bodies are
bounded by the app (service/api/middleware.py).

When the server ends, a request may be on its way on a connection that is idle; closed at once, the
connection would be reset under it. It is answered first, and told that it was the last.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass
from http import HTTPStatus

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.errors import MEDIA_TYPE, ProblemError

log = logging.getLogger("vitrine.connection")


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds of one server's connections."""

    max_connections: int = 4096
    max_silent_bytes: int = 64 * 1024  # received without a head, a piece of body or an end
    head_s: float = 30.0  # from the connection, or a request's first byte, to the end of its head
    last_word_s: float = 0.2  # how long a request may be on its way when the server ends


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Make a class with limits of its own by `bounded`."""

    limits = ConnectionLimits()
    _silent_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _closing_timer: asyncio.TimerHandle | None = None
    is_ending = False  # the server is; set on the class, also for connections still being made

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(
                ProblemError(
                    "too-many-connections",
                    503,
                    f"{len(self.connections) - 1} connections are open, as many as there may be",
                    headers={"Retry-After": "1"},
                )
            )
            return
        self._await_head()
        if self.is_ending:
            self._close_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._closing_timer is not None:
            self._closing_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # refused; what is still on its way is not read
            return
        # A head, its trailers and the extensions of its chunks all count until something comes of
        # them: the callbacks below set this back to 0.
        self._silent_bytes += len(data)
        super().data_received(data)
        if self._silent_bytes > self.limits.max_silent_bytes and not self.transport.is_closing():
            self._refuse(
                ProblemError(
                    "headers-too-large",
                    431,
                    f"the head of the request is longer than {self.limits.max_silent_bytes} bytes",
                )
            )

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are no HTTP/1.1 request."""
        self._refuse(ProblemError("bad-request", 400, msg))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._silent_bytes = 0
        super().on_headers_complete()
        if self.is_ending and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._silent_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.is_ending:
            self._close_soon()

    def shutdown(self) -> None:
        """The server ends: close once nothing more can be on its way."""
        type(self).is_ending = True
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False
        self._close_soon()

    def _close_soon(self) -> None:
        if self._closing_timer is not None:
            self._closing_timer.cancel()
        self._closing_timer = self.loop.call_later(self.limits.last_word_s, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _await_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self.limits.head_s, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self.flow.read_paused:  # it is we who do not read
            self._await_head()
            return
        self._refuse(
            ProblemError(
                "head-timeout", 408, f"no whole request came within {self.limits.head_s:g} s"
            )
        )

    def _refuse(self, error: ProblemError) -> None:
        """Answer instead of the app, and close. Where the client waits for another answer first,
        close only."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        cycle, request_id = self.cycle, uuid.uuid4().hex
        is_coming = cycle is not None and cycle.more_body and not cycle.response_started
        if is_coming:  # it is the one at fault, and the app has named it
            request_id = cycle.scope.get("state", {}).get("request_id", request_id)
        is_next = is_coming or cycle is None or cycle.response_complete
        if is_next and not self.pipeline:
            self.transport.write(_raw_response(error, request_id))
        log.debug("a connection was closed: %s", error.detail, extra={"id": request_id})
        self.transport.close()


def bounded(limits: ConnectionLimits) -> type[BoundedProtocol]:
    """The protocol of one server with these limits; uvicorn makes one for each connection, from
    the class."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})


def _raw_response(error: ProblemError, request_id: str) -> bytes:
    body = msgspec.json.encode(error.problem(request_id))
    headers = {
        "x-request-id": request_id,
        "content-type": MEDIA_TYPE,
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
    return f"{status}{head}\r\n".encode("ascii") + body
