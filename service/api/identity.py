"""Who asks: the API key of a request, by name. Pure ASGI."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import playground
from service.api.errors import ProblemError
from service.api.keys import ApiKey, api_key_hash

OPEN_PATHS = "/health/"
_STATE = "api_key_name"


def key_name_of(request: HTTPConnection) -> str | None:
    """The name of the API key that the request came with; None on a server without keys and on
    /health/*."""
    name: str | None = request.scope["state"].get(_STATE)
    return name


class ApiKeyMiddleware:
    """Asks for an API key on every route but health, and notes its name for `key_name_of`;
    without keys, lets everyone in. The playground's files also open to its cookie."""

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey]) -> None:
        self.app = app
        self._keys = tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or scope["path"].startswith(OPEN_PATHS):
            await self.app(scope, receive, send)
            return
        key = self._presented(scope)
        if key is not None and playground.is_navigation(scope):
            send = _with_cookie(send, playground.page_cookie(scope, key))
        if key is None and playground.is_page_request(scope):
            key = playground.page_cookie_key(scope, self._keys)
        if key is not None:
            scope["state"][_STATE] = key.name
            await self.app(scope, receive, send)
            return
        error = ProblemError(
            "unauthorized",
            401,
            "this server asks for an API key: Authorization: Bearer <key>",
            headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
        )
        refusal = error.response(scope)
        if playground.is_navigation(scope):
            refusal = playground.door(refusal)
        await refusal(scope, receive, send)

    def _presented(self, scope: Scope) -> ApiKey | None:
        """The key that the request shows, if it is one of ours."""
        scheme, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
        presented = api_key_hash(secret.strip().encode("latin-1"))  # a header is bytes
        # All of them, each in constant time: how long it takes tells nothing.
        matches = [key for key in self._keys if hmac.compare_digest(presented, key.digest)]
        return matches[0] if matches and scheme.lower() == "bearer" else None


def _with_cookie(send: Send, cookie: str) -> Send:
    async def send_with_cookie(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).append("set-cookie", cookie)
        await send(message)

    return send_with_cookie
