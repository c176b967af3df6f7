"""Put the HTTP interface together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Lifespan

from model.tokenizer import Tokenizer
from service.api import (
    docs,
    errors,
    explain,
    generate,
    openai_chat,
    openai_completions,
    openai_models,
    openapi,
    operations,
    playground,
    resume,
    tokenization,
)
from service.api.context import ApiContext
from service.api.generation import ActiveGenerations
from service.api.identity import ApiKeyMiddleware
from service.api.limits import ApiLimits
from service.api.middleware import BodyLimitMiddleware, HeaderLimitMiddleware, LingerMiddleware
from service.api.quotas import KeyQuotas
from service.api.recent import RecentRequests
from service.api.resumable import ResumableStreams
from service.api.structured_output import Checker
from service.api.visit import Visit, VisitMiddleware, log_line
from service.chat_renderer import ChatRenderer
from service.client import Engine
from service.metric_aliases import register_aliases
from service.metric_collectors import BuildCollector, DeviceCollector, EngineCollector
from service.metric_recording import Metrics
from service.metrics import Requests

DESCRIPTION = "One transformer, one batched engine, one HTTP service."


def create_app(
    settings: ApiLimits,
    engine: Engine,
    tokenizer: Callable[[], Tokenizer | None],
    model_name: str,
    *,
    chat_renderer: Callable[[], ChatRenderer | None] = lambda: None,
    grammars: Checker | None = None,
    lifespan: Lifespan[Any] | None = None,
    metric_aliases: tuple[str, ...] = (),
    on_complete: Iterable[Callable[[Visit], None]] = (log_line,),
) -> FastAPI:
    """The ASGI application; importing and making it loads no model.

    `tokenizer` returns None while it is being loaded, `chat_renderer` while the tokenizer is, and
    for a model without a chat template. `app.state.context` is the `ApiContext`. `on_complete` is
    told of each request that is over. Without `grammars`, requests for structured output are
    refused. `metric_aliases` are sets of `service.metric_aliases.ALIASES`.
    """
    metrics = Metrics()
    devices = DeviceCollector(engine)
    for collector in (EngineCollector(engine), devices, BuildCollector(engine, model_name)):
        metrics.registry.register(collector)
    register_aliases(metric_aliases, metrics, engine, model_name)
    resumable = ResumableStreams(settings.max_detachable, settings.max_detach_bytes)
    recent = RecentRequests(settings.max_explain_tokens)
    metrics.watch(Requests.DETACHABLE, resumable.__len__)
    metrics.watch(Requests.DETACHABLE_BYTES, lambda: resumable.num_bytes)
    generations = ActiveGenerations(engine, metrics, recent)
    metrics.watch(Requests.IN_FLIGHT, generations.__len__)
    context = ApiContext(
        limits=settings,
        engine=engine,
        tokenizer=tokenizer,
        model_name=model_name,
        metrics=metrics,
        devices=devices,
        chat_renderer=chat_renderer,
        generations=generations,
        resumable=resumable,
        recent=recent,
        grammars=grammars,
    )
    app = FastAPI(
        title="Vitrine",
        description=DESCRIPTION,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.context = context
    # The last added is the first that a request meets.
    app.add_middleware(
        BodyLimitMiddleware, max_bytes=settings.max_body_bytes, max_s=settings.body_timeout_s
    )
    app.add_middleware(ApiKeyMiddleware, keys=settings.api_keys)
    if settings.cors_origins:  # outside of the keys: a browser's preflight brings none
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Last-Event-ID", "X-Request-Id"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    app.add_middleware(HeaderLimitMiddleware)
    app.add_middleware(LingerMiddleware)

    def count_strangers(visit: Visit) -> None:
        """They come no further than the keys; the routes count what they refuse themselves."""
        if errors.problem_kind_of(visit.scope) == "unauthorized":
            metrics.rejected(visit.route, "unauthorized")

    quotas = KeyQuotas(settings.max_requests_per_key, settings.max_tokens_per_minute_per_key)
    app.add_middleware(
        VisitMiddleware,
        quotas=quotas,
        metrics=metrics,
        on_complete=(count_strangers, *on_complete),
    )
    errors.install(app)
    for module in (
        generate,
        resume,
        openai_completions,
        openai_chat,
        openai_models,
        tokenization,
        explain,
        operations,
    ):
        app.include_router(module.routes(context))
    app.include_router(playground.routes())
    openapi.install(app, has_keys=bool(settings.api_keys))
    docs.install(app)
    return app
