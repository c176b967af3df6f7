"""Describe the routes in OpenAPI: the bodies are read and written by hand, so their schemas
are put in by hand too, from the same models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.api import (
    answers,
    explain_answers,
    explain_schemas,
    openai_answers,
    openai_schemas,
    schemas,
)
from service.api.errors import MEDIA_TYPE, OpenAIErrorAnswer, Problem
from service.api.identity import OPEN_PATHS

_REF = "#/components/schemas/{}"
# Before a request reaches its route.
_AT_THE_DOOR = {
    401: "The API key is missing or wrong.",
    408: "The request did not come in time.",
    413: "The body is over the limit.",
    431: "The headers are over the limit.",
    503: "The engine cannot take a request now; Retry-After says when to come again.",
}
_REFUSALS = _AT_THE_DOOR | {
    415: "The body is not declared as JSON.",
    422: "A field is wrong, unknown or unsupported, or the request can never fit.",
    429: "The queue is full, or the key has enough; Retry-After says when to come again.",
}
# Of some routes alone.
_OWN_REFUSALS = {
    403: "Explanations are switched off on this server.",
    404: "There is no such request or model, or it is another API key's.",
    409: "The request id is in use; see detach_s.",
}
_HEADERS = {
    401: {"WWW-Authenticate": "The scheme that is asked for."},
    429: {"Retry-After": "Whole seconds."},
    503: {"Retry-After": "Whole seconds."},
}
_REQUESTS: tuple[type[BaseModel], ...] = (
    schemas.GenerateRequest,
    schemas.TokenizeRequest,
    schemas.DetokenizeRequest,
    explain_schemas.ExplainRequest,
    openai_schemas.CompletionRequest,
    openai_schemas.ChatRequest,
)
_ANSWERS: tuple[type[msgspec.Struct], ...] = (
    answers.StartEvent,
    answers.TokenEvent,
    answers.DoneEvent,
    answers.GenerateAnswer,
    answers.CancelAnswer,
    answers.TokenizeAnswer,
    answers.DetokenizeAnswer,
    explain_answers.ExplainAnswer,
    answers.HealthAnswer,
    answers.InfoAnswer,
    openai_answers.Completion,
    openai_answers.ChatCompletion,
    openai_answers.ChatCompletionChunk,
    openai_answers.ModelCard,
    openai_answers.ModelList,
    OpenAIErrorAnswer,
    Problem,
)


def describe(
    request: type[BaseModel] | None,
    answer: type[msgspec.Struct] | None,
    events: Sequence[type[msgspec.Struct]] = (),
    refusals: Sequence[int] = (),
    *,
    refusal: type[Problem | OpenAIErrorAnswer] = Problem,
) -> dict[str, Any]:
    """Keyword arguments of a route's decorator: its body, its answer (None: events only), and
    its refusals, of the type `refusal`, besides those of every route with a body or of every one
    without."""
    content: dict[str, Any] = {}
    if answer is not None:
        content["application/json"] = {"schema": _ref(answer)}
    shown: list[type[msgspec.Struct]] = [*events, refusal]
    if events:
        content["text/event-stream"] = {"schema": _one_event(shown)}
    own = {status: (_REFUSALS | _OWN_REFUSALS)[status] for status in refusals}
    usual = _AT_THE_DOOR if request is None else _REFUSALS
    responses = _responses(usual | own, refusal)
    described: dict[str, Any] = {"responses": {200: {"content": content}, **responses}}
    if request is not None:
        body = {"application/json": {"schema": _ref(request)}}
        described["openapi_extra"] = {"requestBody": {"required": True, "content": body}}
    return described


def describe_text(*media_types: str) -> dict[str, Any]:
    """Keyword arguments of a route's decorator that answers with plain text of these kinds."""
    content = {media_type: {"schema": {"type": "string"}} for media_type in media_types}
    return {"responses": {200: {"content": content}, **_responses(_AT_THE_DOOR)}}


def _responses(
    refusals: Mapping[int, str], refusal: type[Problem | OpenAIErrorAnswer] = Problem
) -> dict[int, dict[str, Any]]:
    media_type = MEDIA_TYPE if refusal is Problem else "application/json"
    return {
        status: {
            "description": refusals[status],
            "content": {media_type: {"schema": _ref(refusal)}},
            **_headers(status),
        }
        for status in sorted(refusals)
    }


def _one_event(data: Sequence[type[msgspec.Struct]]) -> dict[str, Any]:
    """An event of a stream: OpenAPI 3.1 has the schema of a stream describe each of its items."""
    return {
        "type": "object",
        "required": ["data"],
        "properties": {
            "id": {"type": "string"},
            "event": {"type": "string"},
            "data": _event_data(data),
        },
    }


def _event_data(data: Sequence[type[msgspec.Struct]]) -> dict[str, Any]:
    as_json = {
        "description": ", ".join(one.__name__ for one in data) + ", as JSON.",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(one) for one in data]},
    }
    if OpenAIErrorAnswer not in data:
        return {"type": "string", **as_json}
    # OpenAI's streams end with a word that is no JSON.
    return {"type": "string", "anyOf": [{"const": "[DONE]"}, as_json]}


def _headers(status: int) -> dict[str, Any]:
    headers = {
        name: {"description": text, "schema": {"type": "string"}, "required": True}
        for name, text in _HEADERS.get(status, {}).items()
    }
    return {"headers": headers} if headers else {}


def install(app: FastAPI, *, has_keys: bool) -> None:
    """Make `app.openapi` tell the schemas too, and the API key where one is asked for."""
    without_bodies = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = without_bodies()
            schema.setdefault("components", {}).setdefault("schemas", {}).update(_components())
            if has_keys:
                _ask_for_keys(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _ask_for_keys(schema: dict[str, Any]) -> None:
    scheme = {"type": "http", "scheme": "bearer", "description": "An API key of this server."}
    schema["components"]["securitySchemes"] = {"api_key": scheme}
    schema["security"] = [{"api_key": []}]
    for path, operations in schema["paths"].items():
        if path.startswith(OPEN_PATHS):
            for operation in operations.values():
                operation["security"] = []


def _components() -> dict[str, Any]:
    _, requests = models_json_schema(
        [(model, "validation") for model in _REQUESTS], ref_template=_REF.format("{model}")
    )
    _, responses = msgspec.json.schema_components(_ANSWERS, ref_template=_REF.format("{name}"))
    return {**requests.get("$defs", {}), **responses}


def _ref(model: type) -> dict[str, str]:
    return {"$ref": _REF.format(model.__name__)}
