"""GET /: the playground, and its files under /web.

The files are read once, when the app is made: there are a few of them, and what a server serves
does not change under it. Their addresses are relative, so that the page also works under a path
of a proxy.

A browser cannot send a bearer header when it navigates. Where keys are asked for, GET / therefore
answers a browser 401 with a page that has a field for the key. With the key it asks again, and the
answer sets a cookie that opens the playground's files and nothing else: every call that the page
makes carries the key itself.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Scope

from service.api.errors import ProblemError
from service.api.keys import ApiKey

PAGE_PATH = "/"
FILES_PATH = "/web/"
FILES_ROUTE = FILES_PATH + "{name:path}"
COOKIE = "vitrine_page"

_FOLDER = Path(__file__).parent.parent / "web"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
_PAGE, _DOOR = "index.html", "door.html"
_COMMON_POLICY = "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_PAGE_POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; img-src 'self'; "
    f"{_COMMON_POLICY}; require-trusted-types-for 'script'; trusted-types 'none'"
)
_COMMON_HEADERS = {
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class WebFile:
    """A static file in memory."""

    data: bytes
    media_type: str
    etag: str


def routes() -> APIRouter:
    """GET / and GET /web/...: static, the same for everyone."""
    router = APIRouter(include_in_schema=False)
    files = _files()

    @router.get(PAGE_PATH)
    async def page(request: Request) -> Response:
        return _answer(request, files[_PAGE], {"content-security-policy": _PAGE_POLICY})

    @router.get(FILES_ROUTE)
    async def file(request: Request, name: str) -> Response:
        found = None if name in (_PAGE, _DOOR) else files.get(name)
        if found is None:
            raise ProblemError("not-found", 404, "the playground has no such file")
        return _answer(request, found, {})

    return router


def is_page_request(scope: Scope) -> bool:
    """Whether a request is for the playground or one of its files."""
    path: str = scope["path"]
    return scope["method"] == "GET" and (path == PAGE_PATH or path.startswith(FILES_PATH))


def is_navigation(scope: Scope) -> bool:
    """Whether it is a browser that opens the playground."""
    accept = Headers(scope=scope).get("accept", "")
    return scope["method"] == "GET" and scope["path"] == PAGE_PATH and "text/html" in accept


def page_cookie_key(scope: Scope, keys: tuple[ApiKey, ...]) -> ApiKey | None:
    """The key behind the cookie of a request for the playground; compared in constant time."""
    presented = HTTPConnection(scope).cookies.get(COOKIE, "").encode()
    matches = [key for key in keys if hmac.compare_digest(presented, _token(key).encode())]
    return matches[0] if matches else None


def page_cookie(scope: Scope, key: ApiKey) -> str:
    """A Set-Cookie that opens the playground's files until the browser is closed.

    Made of the key's digest, so that it is good at each of several servers with the same keys, and
    no longer when the key is gone. No path: it stays below the page's own.
    """
    secure = "; Secure" if scope["scheme"] == "https" else ""
    return f"{COOKIE}={_token(key)}; HttpOnly; SameSite=Lax{secure}"


def door(refusal: Response) -> Response:
    """`refusal`, a 401, as a page with a field for the key."""
    headers = {name: refusal.headers[name] for name in ("www-authenticate", "connection")}
    file = _files()[_DOOR]
    headers |= _COMMON_HEADERS | {"content-security-policy": _door_policy(), "vary": "accept"}
    return Response(file.data, refusal.status_code, headers, media_type=file.media_type)


@cache
def _files() -> dict[str, WebFile]:
    """Every file of the playground by its path, as in `fonts/LICENSE`."""
    files = {}
    for path in sorted(_FOLDER.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            media_type = _MEDIA_TYPES.get(path.suffix, "text/plain; charset=utf-8")
            etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            files[path.relative_to(_FOLDER).as_posix()] = WebFile(data, media_type, etag)
    return files


@cache
def _door_policy() -> str:
    """The door has its one script and its style inside of it: a browser has no other way to get
    them before the key is there. Their digests let these two run and nothing else."""
    text = _files()[_DOOR].data.decode()
    sources = []
    for tag in ("script", "style"):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()) for one in inside]
        sources.append(f"{tag}-src " + " ".join(f"'sha256-{one.decode()}'" for one in digests))
    return f"default-src 'none'; {'; '.join(sources)}; {_COMMON_POLICY}"


def _token(key: ApiKey) -> str:
    return hmac.new(key.digest, b"vitrine playground files", hashlib.sha256).hexdigest()


def _answer(request: Request, file: WebFile, headers: dict[str, str]) -> Response:
    headers = _COMMON_HEADERS | headers | {"etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.data, headers=headers, media_type=file.media_type)
