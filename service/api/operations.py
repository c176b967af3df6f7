"""Routes for whoever runs the server: health, what is loaded, metrics."""

from __future__ import annotations

import platform
from dataclasses import asdict

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api import answers
from service.api.answers import HealthAnswer, InfoAnswer, KvCacheInfo
from service.api.context import RETRY_AFTER_START_S, ApiContext
from service.api.errors import ProblemError, retry_after
from service.api.openapi import describe, describe_text
from service.metric_collectors import package_version

_SHOWN_PACKAGES = ("vitrine", "fastapi", "uvicorn", "pydantic", "msgspec", "tokenizers")


def routes(context: ApiContext) -> APIRouter:
    """The routes, on these parts."""
    router = APIRouter(tags=["operations"])
    versions = {"python": platform.python_version()} | {
        package: package_version(package) for package in _SHOWN_PACKAGES
    }

    @router.get("/health/live", summary="The process answers", **describe(None, HealthAnswer))
    async def live() -> Response:
        return Response(answers.encode(HealthAnswer("live")), media_type="application/json")

    @router.get(
        "/health/ready",
        summary="The engine can take a request",
        **describe(None, HealthAnswer),
    )
    async def ready() -> Response:
        reason = context.unready_reason()
        if reason:
            raise ProblemError("unavailable", 503, reason, headers=retry_after(RETRY_AFTER_START_S))
        return Response(answers.encode(HealthAnswer("ready")), media_type="application/json")

    @router.get("/info", summary="What is loaded", **describe(None, InfoAnswer))
    async def info() -> Response:
        return Response(answers.encode(_info(context, versions)), media_type="application/json")

    @router.get(
        "/metrics",
        summary="Metrics as Prometheus text, or OpenMetrics when asked for",
        **describe_text("text/plain", "application/openmetrics-text"),
    )
    async def metrics(request: Request) -> Response:
        await context.devices.refresh()
        data, content_type = await context.metrics.exposition(request.headers.get("accept", ""))
        return Response(data, headers={"content-type": content_type})

    return router


def _info(context: ApiContext, versions: dict[str, str]) -> InfoAnswer:
    _, info = context.loaded()
    limits = asdict(context.limits)
    limits = {name: value for name, value in limits.items() if isinstance(value, int | float)}
    return InfoAnswer(
        model=context.model_name,
        family=info.family,
        parameters=info.num_parameters,
        dtype=info.dtype,
        device=info.device,
        context_length=info.context_length,
        vocab_size=info.vocab_size,
        num_layers=info.num_layers,
        num_heads=info.num_heads,
        num_kv_heads=info.num_kv_heads,
        head_dim=info.head_dim,
        hidden_size=info.hidden_size,
        eos_token_ids=info.eos_token_ids,
        kv_cache=KvCacheInfo(
            tokens=info.num_blocks * info.block_size,
            bytes=info.kv_cache_bytes,
            blocks=info.num_blocks,
            block_size=info.block_size,
        ),
        weight_bytes=info.weight_bytes,
        load_s=info.load_s,
        threads=info.threads,
        deterministic=info.deterministic,
        attention_backend=info.attention_backend,
        tensor_parallel_size=info.tensor_parallel_size,
        engine=context.engine.state,
        versions=versions | {"torch": info.torch_version},
        limits=limits,
    )
