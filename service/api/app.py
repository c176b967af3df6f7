"""Put the HTTP interface together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.types import Lifespan

from model.tokenizer import Tokenizer
from service.api import (
    errors,
    generate,
    openai_chat,
    openai_completions,
    openai_models,
    openapi,
    operations,
    resume,
    tokenization,
)
from service.api.context import ApiContext
from service.api.generation import ActiveGenerations
from service.api.identity import ApiKeyMiddleware
from service.api.limits import ApiLimits
from service.api.middleware import BodyLimitMiddleware, RequestIdMiddleware
from service.api.resumable import ResumableStreams
from service.chat_renderer import ChatRenderer
from service.client import Engine
from service.metrics import Metrics

DESCRIPTION = "One transformer, one batched engine, one HTTP service."


def create_app(
    settings: ApiLimits,
    engine: Engine,
    tokenizer: Callable[[], Tokenizer | None],
    model_name: str,
    *,
    chat_renderer: Callable[[], ChatRenderer | None] = lambda: None,
    lifespan: Lifespan[Any] | None = None,
) -> FastAPI:
    """The ASGI application; importing and making it loads no model.

    `tokenizer` returns None while it is being loaded, `chat_renderer` while the tokenizer is, and
    for a model without a chat template. `app.state.context` is the `ApiContext`.
    """
    metrics = Metrics()
    metrics.watch_engine(lambda: engine.stats, lambda: engine.health)
    resumable = ResumableStreams(settings.max_detachable, settings.max_detach_bytes)
    metrics.watch("detachable_requests", "Requests kept for their detach_s.", resumable.__len__)
    metrics.watch("detachable_bytes", "Bytes of their events.", lambda: resumable.num_bytes)
    context = ApiContext(
        limits=settings,
        engine=engine,
        tokenizer=tokenizer,
        model_name=model_name,
        metrics=metrics,
        chat_renderer=chat_renderer,
        generations=ActiveGenerations(engine, metrics, settings.max_events_s),
        resumable=resumable,
    )
    app = FastAPI(
        title="Vitrine",
        description=DESCRIPTION,
        redirect_slashes=False,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.context = context
    # The last added is the first that a request meets.
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes)
    app.add_middleware(ApiKeyMiddleware, keys=settings.api_keys)
    app.add_middleware(RequestIdMiddleware)
    errors.install(app)
    for module in (
        generate,
        resume,
        openai_completions,
        openai_chat,
        openai_models,
        tokenization,
        operations,
    ):
        app.include_router(module.routes(context))
    openapi.install(app)
    return app
