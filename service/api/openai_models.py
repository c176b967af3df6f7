"""GET /v1/models: the one model, as OpenAI's clients list it."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.responses import Response

from service.api import answers
from service.api.context import ApiContext
from service.api.errors import OpenAIErrorAnswer
from service.api.openai_answers import ModelCard, ModelList
from service.api.openai_stream import check_model
from service.api.openapi import describe


def routes(context: ApiContext) -> APIRouter:
    """The routes, on these parts."""
    router = APIRouter(tags=["openai"])
    # A checkpoint does not say when it was made: since when this server has it.
    card = ModelCard(context.model_name, created=int(time.time()))

    @router.get(
        "/v1/models",
        summary="The served model, in OpenAI's shapes",
        **describe(None, ModelList, refusal=OpenAIErrorAnswer),
    )
    async def models() -> Response:
        return Response(answers.encode(ModelList([card])), media_type="application/json")

    @router.get(
        "/v1/models/{model:path}",
        summary="The served model by its name",
        **describe(None, ModelCard, refusals=(404,), refusal=OpenAIErrorAnswer),
    )
    async def model(model: str) -> Response:
        check_model(model, context)
        return Response(answers.encode(card), media_type="application/json")

    return router
