"""The only place that turns failures into responses: problem+json (RFC 9457), and OpenAI's
error object on its routes.

A message names the field, the value and the limit; it never shows a stack, a path of the
machine or an address.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus

import msgspec
import pydantic
from fastapi import FastAPI
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from service.client import EngineUnavailableError, NeverFitsError, QueueFullError

MEDIA_TYPE = "application/problem+json"
OPENAI_PATHS = "/v1/"
CONTEXT_EXCEEDED = "context_length_exceeded"
# What OpenAI calls a kind of ours; clients of its interface look at these words.
_OPENAI_CODES = {
    "invalid-request": None,
    "never-fits": None,
    "queue-full": "rate_limit_exceeded",
    "unauthorized": "invalid_api_key",
}
TAG_MARK = "~"  # begins the names of union branches, which are no part of a field's path
_STATE = "problem_kind"
_MAX_SHOWN_CHARS = 80
_MAX_SHOWN_ERRORS = 5

log = logging.getLogger(__name__)


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """What went wrong, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    instance: str  # the request id
    field: str | None = None


class OpenAIError(msgspec.Struct, frozen=True):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorAnswer(msgspec.Struct, frozen=True):
    """The error object of the /v1 routes."""

    error: OpenAIError


class ProblemError(Exception):
    """A failure that knows how it is answered."""

    def __init__(
        self,
        kind: str,
        status: int,
        detail: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        """`kind` is the short name at the end of the problem's type, e.g. "queue-full"; `code` is
        OpenAI's name for it where the kind does not say enough."""
        super().__init__(detail)
        self.kind = kind
        self.status = status
        self.detail = detail
        self.field = field
        self.headers = dict(headers or {})
        self.code = code or _OPENAI_CODES.get(kind, kind.replace("-", "_"))

    def problem(self, request_id: str) -> Problem:
        """The body of the answer."""
        return Problem(
            type=f"urn:vitrine:problem:{self.kind}",
            title=HTTPStatus(self.status).phrase,
            status=self.status,
            detail=_encodable(self.detail),
            instance=request_id,
            field=None if self.field is None else _encodable(self.field),
        )

    def openai_error(self) -> OpenAIErrorAnswer:
        """The body of the answer on OpenAI's routes."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return OpenAIErrorAnswer(
            OpenAIError(
                message=_encodable(self.detail),
                type="rate_limit_error" if self.status == 429 else kind,
                param=None if self.field is None else _encodable(self.field),
                code=self.code,
            )
        )

    def response(self, scope: Scope) -> Response:
        """The answer to the request of this scope, in the words of its route."""
        _note_kind(scope, self.kind)
        if scope["path"].startswith(OPENAI_PATHS):
            body, media_type = msgspec.json.encode(self.openai_error()), "application/json"
        else:
            body = msgspec.json.encode(self.problem(scope["state"]["request_id"]))
            media_type = MEDIA_TYPE
        return Response(body, self.status, self.headers, media_type=media_type)


class ClientGoneError(Exception):
    """The client went away before its answer was ready; nobody reads what is sent now."""


def invalid_field(field: str, detail: str, *, code: str | None = None) -> ProblemError:
    """A field's value that cannot be used: 422."""
    return ProblemError("invalid-request", 422, f"{field}: {detail}", field=field, code=code)


def invalid_body(error: pydantic.ValidationError) -> ProblemError:
    """A body that does not fit its schema, or is no JSON: 422, with every field named."""
    errors = error.errors(include_url=False)
    details = [_describe(one) for one in errors[:_MAX_SHOWN_ERRORS]]
    if len(errors) > _MAX_SHOWN_ERRORS:
        details.append(f"and {len(errors) - _MAX_SHOWN_ERRORS} more")
    location = errors[0]["loc"]
    field = str(location[0]) if location else None
    return ProblemError("invalid-request", 422, "; ".join(details), field=_shorten(field))


def from_exception(error: Exception) -> ProblemError:
    """How a failure is answered; whatever is not known here is the server's fault: 500."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, QueueFullError):
        headers = retry_after(error.retry_after_s)
        return ProblemError("queue-full", 429, str(error), headers=headers)
    if isinstance(error, EngineUnavailableError):
        headers = retry_after(error.retry_after_s)
        return ProblemError("unavailable", 503, str(error), headers=headers)
    if isinstance(error, NeverFitsError):
        code = None if error.field == "n" else CONTEXT_EXCEEDED
        return ProblemError("never-fits", 422, str(error), field=error.field, code=code)
    if isinstance(error, pydantic.ValidationError):
        return invalid_body(error)
    return ProblemError(
        "internal", 500, "the server failed on this request; its log has this request id"
    )


def retry_after(seconds: float) -> dict[str, str]:
    """The Retry-After header, in whole seconds, at least one."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def request_id_of(request: Request) -> str:
    """The id that the middleware gave this request."""
    request_id: str = request.state.request_id
    return request_id


def problem_kind_of(scope: Scope) -> str | None:
    """The kind of problem that a request was answered with, if it was."""
    kind: str | None = scope["state"].get(_STATE)
    return kind


def _note_kind(scope: Scope, kind: str) -> None:
    scope["state"][_STATE] = kind


def install(app: FastAPI) -> None:
    """Register the handlers. What they do not know reaches the middleware that answers 500."""
    app.exception_handler(HTTPException)(_on_http_exception)
    app.exception_handler(ClientDisconnect)(_on_client_gone)
    app.exception_handler(ClientGoneError)(_on_client_gone)
    for known in (ProblemError, QueueFullError, EngineUnavailableError, NeverFitsError):
        app.exception_handler(known)(_on_known)


async def _on_known(request: Request, error: Exception) -> Response:
    return from_exception(error).response(request.scope)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    log.debug("request %s: the client went away (%s)", request_id_of(request), error)
    return Response(status_code=499)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    what = f"{request.method} {request.url.path}"
    headers = dict(error.headers or {})
    match error.status_code:
        case 404:
            problem = ProblemError("not-found", 404, f"there is no route for {_show(what)}")
        case 405:
            detail = f"{_show(what)} is not allowed; allowed: {headers.get('Allow', 'nothing')}"
            problem = ProblemError("method-not-allowed", 405, detail, headers=headers)
        case status:
            problem = ProblemError("http", status, str(error.detail), headers=headers)
    return problem.response(request.scope)


def _describe(error: ErrorDetails) -> str:
    """One error of pydantic's in words: field, reason, value."""
    kind, path = error["type"], _path(error["loc"])
    if kind == "missing":
        return f"{path}: this field is required"
    if kind == "extra_forbidden":
        return f"{path}: unknown or unsupported field"
    if not path and kind in ("model_type", "dict_type"):
        return f"the body: it must be a JSON object, got {_show(error['input'])}"
    return f"{path or 'the body'}: {error['msg']}, got {_show(error['input'])}"


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith((TAG_MARK, "[key]")):
            path += f".{_shorten(step)}" if path else str(_shorten(step))
    return path


def _show(value: object) -> str:
    """A value as a message may show it: short, whatever a client sent."""
    if isinstance(value, str):
        return str(_shorten(repr(value[: _MAX_SHOWN_CHARS + 1])))
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)} members"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(_shorten(str(value)))


def _shorten(text: str | None) -> str | None:
    if text is None or len(text) <= _MAX_SHOWN_CHARS:
        return text
    return text[:_MAX_SHOWN_CHARS] + "..."


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which no JSON can carry."""
    return text.encode("utf-8", "replace").decode()
