"""Bounds on what a request brings, whatever route it is for. Pure ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import ProblemError

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024  # names and values
# What of a refused body is read and dropped before the connection is closed.
LINGER_BYTES = 32 * 2**20
LINGER_S = 5.0


class HeaderLimitMiddleware:
    """Answers 431 to a head of too many headers or bytes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"] if scope["type"] == "http" else ()
        num_bytes = sum(len(name) + len(value) for name, value in headers)
        if len(headers) <= MAX_HEADERS and num_bytes <= MAX_HEADER_BYTES:
            await self.app(scope, receive, send)
            return
        error = ProblemError(
            "headers-too-large",
            431,
            f"the request has {len(headers)} headers of {num_bytes} bytes; the limits are "
            f"{MAX_HEADERS} and {MAX_HEADER_BYTES}",
            headers={"Connection": "close"},
        )
        await error.response(scope)(scope, receive, send)


class LingerMiddleware:
    """Reads on, for a while, when an answer closes the connection before the body is there.

    Closing with bytes unread makes the system reset the connection, and a client that sends its
    whole body before it reads would never see why it was refused.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_read = is_closing = False

        async def watched_receive() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def lingering_send(message: Message) -> None:
            nonlocal is_closing
            if message["type"] == "http.response.start":
                is_closing = Headers(raw=message["headers"]).get("connection") == "close"
            elif is_closing and not is_read and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _drop_body(watched_receive, lambda: is_read)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await self.app(scope, watched_receive, lingering_send)


class BodyLimitMiddleware:
    """Answers 413 to a body over the limit: by its content-length before it is read, or by
    counting, as soon as it is too long; and 408 to one that does not come."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_s: float) -> None:
        self.app = app
        self._max_bytes = max_bytes
        self._max_s = max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._max_bytes:
            error = self._too_large(f"{int(declared[:20])} bytes")
            await error.response(scope)(scope, receive, send)
            return
        num_bytes = 0
        is_read = False
        began_s = asyncio.get_running_loop().time()

        async def counted() -> Message:
            nonlocal num_bytes, is_read
            if is_read:  # what comes now is the disconnect, whenever it comes
                return await receive()
            try:
                async with asyncio.timeout_at(began_s + self._max_s):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow(num_bytes) from None
            num_bytes += len(message.get("body", b""))
            is_read = message["type"] != "http.request" or not message.get("more_body", False)
            if num_bytes > self._max_bytes:
                raise self._too_large(f"at least {num_bytes} bytes")
            return message

        await self.app(scope, counted, send)

    def _too_large(self, size: str) -> ProblemError:
        return ProblemError(
            "too-large",
            413,
            f"the body has {size}; the limit is {self._max_bytes} bytes",
            headers={"Connection": "close"},  # the rest of the body is not wanted
        )

    def _too_slow(self, num_bytes: int) -> ProblemError:
        return ProblemError(
            "body-timeout",
            408,
            f"{num_bytes} bytes of the body came within {self._max_s:g} s, and not its end",
            headers={"Connection": "close"},
        )


async def _drop_body(receive: Receive, is_read: Callable[[], bool]) -> None:
    num_bytes = 0
    try:
        async with asyncio.timeout(LINGER_S):
            while not is_read() and num_bytes <= LINGER_BYTES:
                num_bytes += len((await receive()).get("body", b""))
    except TimeoutError:
        pass  # long enough
