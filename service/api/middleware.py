"""What every request passes first: its id, the size of its body (its API key: identity.py). Pure
ASGI."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import ProblemError, from_exception

log = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestIdMiddleware:
    """Gives every request an id and every response its X-Request-Id; the last resort for
    exceptions that nothing inside knows."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        wanted = Headers(scope=scope).get("x-request-id", "")
        request_id = wanted if _SANE_ID.fullmatch(wanted) else uuid.uuid4().hex
        # A copy: a server may hand one dict to all requests.
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if started:
                raise
            log.exception("request %s failed", request_id)
            await from_exception(error).response(scope)(scope, receive, send_with_id)


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
            await error.response(scope)(scope, receive, send)
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
