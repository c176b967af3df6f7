"""Traces for an OpenTelemetry collector: a span for each request, and in it the queue, the prefill
and the decode of each continuation. Off unless asked for; needs `vitrine[otel]`.

Spans are made when a request is over, from the times that its log line has too: nothing of this
runs while tokens are made, and nothing at all when it is off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from service.api.continuation import Continuation
from service.api.generation import Generation
from service.api.visit import Visit

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

SERVICE_NAME = "vitrine"
_ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TRUE = "true"
_QUIET_PREFIXES = ("/health/", "/metrics")


class TracingError(Exception):
    """Traces were asked for and cannot be made; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Tracing:
    """Where visits are told, and how that ends."""

    on_complete: Callable[[Visit], None]
    shutdown: Callable[[], None]  # sends what is left; blocks for a few seconds at most


def start_tracing(
    endpoint: str | None, model_name: str, environment: Mapping[str, str] = os.environ
) -> Tracing | None:
    """Traces to the collector at `endpoint` (or where the standard OTEL_* variables say); None
    when neither names one, or OTEL_SDK_DISABLED is true.

    Raises `TracingError` when the libraries are not installed.
    """
    named = endpoint or any(environment.get(name) for name in _ENDPOINT_VARIABLES)
    if not named or environment.get("OTEL_SDK_DISABLED", "").lower() == _TRUE:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingError(f"traces need pip install 'vitrine[otel]': {error}") from None
    # The variable wins over our default name, as everywhere.
    name = environment.get("OTEL_SERVICE_NAME", SERVICE_NAME)
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    url = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return trace_with(provider, model_name)


def trace_with(provider: TracerProvider, model_name: str) -> Tracing:
    """Traces by a provider that is there."""
    tracer = provider.get_tracer(SERVICE_NAME)

    def on_complete(visit: Visit) -> None:
        if not visit.route.startswith(_QUIET_PREFIXES):
            _record(tracer, visit, model_name)

    return Tracing(on_complete, provider.shutdown)


def _record(tracer: Tracer, visit: Visit, model_name: str) -> None:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers = Headers(scope=visit.scope)
    carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
    method, status = visit.scope["method"], visit.status
    span = tracer.start_span(
        f"{method} {visit.route}",
        context=TraceContextTextMapPropagator().extract(carrier),
        kind=trace.SpanKind.SERVER,
        start_time=visit.began_ns,
        # Names from OpenTelemetry's semantic conventions (HTTP, gen_ai).
        attributes={
            "http.request.method": method,
            "http.route": visit.route,
            "vitrine.request_id": visit.request_id,
        },
    )
    if status is not None:
        span.set_attribute("http.response.status_code", status)
    if visit.key_name is not None:
        span.set_attribute("vitrine.api_key_name", visit.key_name)
    inside = trace.set_span_in_context(span)
    is_failed = status is None or status >= 500
    for ticket in visit.tickets:
        is_failed = is_failed or ticket.outcome == "failed"
        if ticket.generation is not None:
            _record_generation(tracer, inside, visit, ticket.generation)
            usage = [one.usage() for one in ticket.generation.continuations]
            span.set_attribute("gen_ai.request.model", model_name)
            span.set_attribute("gen_ai.usage.input_tokens", usage[0].prompt_tokens)
            span.set_attribute(
                "gen_ai.usage.output_tokens", sum(one.completion_tokens for one in usage)
            )
    if is_failed:
        span.set_status(trace.StatusCode.ERROR)
    span.end(end_time=visit.to_unix_ns(visit.ended_s or visit.began_s))


def _record_generation(
    tracer: Tracer, inside: Context, visit: Visit, generation: Generation
) -> None:
    for continuation in generation.continuations:
        for name, begin_s, end_s in _phases(continuation):
            phase = tracer.start_span(
                name,
                context=inside,
                start_time=visit.to_unix_ns(begin_s),
                attributes={"vitrine.index": continuation.index},
            )
            phase.end(end_time=visit.to_unix_ns(end_s))


def _phases(continuation: Continuation) -> list[tuple[str, float, float]]:
    """Name, begin and end of what a continuation went through, on the monotonic clock. The engine
    tells how long queue and prefill took; the prefill ends with the first token."""
    times = continuation.times
    if times.first_s is None:
        return []
    prefill_s = max(times.arrived_s, times.first_s - times.prefill_s)
    queue_s = max(times.arrived_s, prefill_s - times.queue_s)
    return [
        ("queue", queue_s, prefill_s),
        ("prefill", prefill_s, times.first_s),
        ("decode", times.first_s, times.last_s),
    ]
