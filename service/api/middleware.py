"""Bounds on what a request brings, whatever route it is for. Pure ASGI."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import ProblemError


class BodyLimitMiddleware:
    """Answers 413 to a body over the limit: by its content-length before it is read, or by
    counting, as soon as it is too long."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._max_bytes:
            error = self._too_large(f"{int(declared[:20])} bytes")
            await error.answer(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_bytes:
                    raise self._too_large(f"at least {num_bytes} bytes")
            return message

        await self.app(scope, counted, send)

    def _too_large(self, size: str) -> ProblemError:
        return ProblemError(
            "too-large",
            413,
            f"the body has {size}; the limit is {self._max_bytes} bytes",
            headers={"Connection": "close"},  # the rest of the body is not read
        )
