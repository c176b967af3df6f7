"""Put the HTTP interface together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.types import Lifespan

from model.tokenizer import Tokenizer
from service.api import errors, generate, openapi, operations, tokenization
from service.api.context import ApiContext
from service.api.generation import ActiveGenerations
from service.api.limits import ApiLimits
from service.api.middleware import ApiKeyMiddleware, BodyLimitMiddleware, RequestIdMiddleware
from service.api.structured_output import Checker
from service.client import Engine
from service.metrics import Metrics

DESCRIPTION = "One transformer, one batched engine, one HTTP service."


def create_app(
    settings: ApiLimits,
    engine: Engine,
    tokenizer: Callable[[], Tokenizer | None],
    model_name: str,
    *,
    grammars: Checker | None = None,
    lifespan: Lifespan[Any] | None = None,
) -> FastAPI:
    """The ASGI application; importing and making it loads no model.

    `tokenizer` returns None while it is being loaded; without `grammars`, requests for
    structured output are refused. `app.state.context` is the `ApiContext`.
    """
    metrics = Metrics()
    metrics.watch_engine(lambda: engine.stats)
    context = ApiContext(
        limits=settings,
        engine=engine,
        tokenizer=tokenizer,
        model_name=model_name,
        metrics=metrics,
        generations=ActiveGenerations(engine, metrics),
        grammars=grammars,
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
    app.add_middleware(ApiKeyMiddleware, key_hashes=settings.api_key_hashes)
    app.add_middleware(RequestIdMiddleware)
    errors.install(app)
    for module in (generate, tokenization, operations):
        app.include_router(module.routes(context))
    openapi.install(app)
    return app
