"""Describe the routes in OpenAPI: the bodies are read and written by hand, so their schemas
are put in by hand too, from the same models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.api import answers, openai_answers, openai_schemas, schemas
from service.api.errors import MEDIA_TYPE, OpenAIErrorAnswer, Problem

_REF = "#/components/schemas/{}"
_REFUSALS = {
    401: "The API key is missing or wrong.",
    404: "There is no such request, or it is another API key's.",
    409: "The request id is in use; see detach_s.",
    413: "The body is over the limit.",
    415: "The body is not declared as JSON.",
    422: "A field is wrong, unknown or unsupported, or the request can never fit.",
    429: "The queue is full; Retry-After says when to come again.",
    503: "The engine cannot take a request now; Retry-After says when to come again.",
}
_WITHOUT_BODY = (401, 503)
_WITH_BODY = (401, 413, 415, 422, 429, 503)
_REQUESTS: tuple[type[BaseModel], ...] = (
    schemas.GenerateRequest,
    schemas.TokenizeRequest,
    schemas.DetokenizeRequest,
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
    media_type = MEDIA_TYPE if refusal is Problem else "application/json"
    content: dict[str, Any] = {}
    if answer is not None:
        content["application/json"] = {"schema": _ref(answer)}
    shown: list[type[msgspec.Struct]] = [*events, refusal]
    if events:
        content["text/event-stream"] = {
            "schema": {
                "type": "string",
                "description": "The data of its events: "
                + ", ".join(one.__name__ for one in shown),
            }
        }
    usual = _WITHOUT_BODY if request is None else _WITH_BODY
    responses: dict[int, dict[str, Any]] = {
        status: {
            "description": _REFUSALS[status],
            "content": {media_type: {"schema": _ref(refusal)}},
        }
        for status in sorted({*usual, *refusals})
    }
    described: dict[str, Any] = {"responses": {200: {"content": content}, **responses}}
    if request is not None:
        body = {"application/json": {"schema": _ref(request)}}
        described["openapi_extra"] = {"requestBody": {"required": True, "content": body}}
    return described


def install(app: FastAPI) -> None:
    """Make `app.openapi` tell the schemas too."""
    without_bodies = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = without_bodies()
            schema.setdefault("components", {}).setdefault("schemas", {}).update(_components())
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _components() -> dict[str, Any]:
    _, requests = models_json_schema(
        [(model, "validation") for model in _REQUESTS], ref_template=_REF.format("{model}")
    )
    _, responses = msgspec.json.schema_components(_ANSWERS, ref_template=_REF.format("{name}"))
    return {**requests.get("$defs", {}), **responses}


def _ref(model: type) -> dict[str, str]:
    return {"$ref": _REF.format(model.__name__)}
