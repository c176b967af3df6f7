"""What every request passes first: its id, its API key, the size of its body. Pure ASGI."""

from __future__ import annotations

import hmac
import logging
import re
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import ProblemError, from_exception
from service.api.limits import api_key_hash

log = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_OPEN_PATHS = "/health/"


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


class ApiKeyMiddleware:
    """Asks for an API key on every route but health; without keys, lets everyone in."""

    def __init__(self, app: ASGIApp, key_hashes: Iterable[bytes]) -> None:
        self.app = app
        self._key_hashes = tuple(key_hashes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._key_hashes or self._allowed(scope):
            await self.app(scope, receive, send)
            return
        error = ProblemError(
            "unauthorized",
            401,
            "this server asks for an API key: Authorization: Bearer <key>",
            headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
        )
        await error.response(scope)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        if scope["path"].startswith(_OPEN_PATHS):
            return True
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        presented = api_key_hash(key.strip().encode("latin-1"))  # a header is bytes
        # All of them, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(presented, one) for one in self._key_hashes]
        return scheme.lower() == "bearer" and any(matches)


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
