"""The recording of what happens to requests, in the words of `metrics.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from service.metric_families import Described, exemplar
from service.metrics import (
    COMMON_REJECTIONS,
    FINISH_REASONS,
    GENERATING_ROUTES,
    AbortReason,
    Explain,
    ExplainOutcome,
    Http,
    Latency,
    Outcome,
    Requests,
    Tokens,
)


class Metrics:
    """What one server counts; its own registry, so that two in one process do not mix."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        # Requests
        self._accepted = Requests.ACCEPTED.to_counter(registry)
        self._finished = Requests.FINISHED.to_counter(registry)
        self._aborted = Requests.ABORTED.to_counter(registry)
        self._failed = Requests.FAILED.to_counter(registry)
        self._rejected = Requests.REJECTED.to_counter(registry)
        self._slow_readers = Requests.SLOW_READERS.to_counter(registry)
        # Latency
        self.first_token = Latency.FIRST_TOKEN.to_histogram(registry)
        self.per_output_token = Latency.PER_OUTPUT_TOKEN.to_histogram(registry)
        self.request = Latency.REQUEST.to_histogram(registry)
        self._queue = Latency.QUEUE.to_histogram(registry)
        self._prefill = Latency.PREFILL.to_histogram(registry)
        self._decode = Latency.DECODE.to_histogram(registry)
        # Tokens
        self._prompt = Tokens.PROMPT.to_counter(registry)
        self._cached = Tokens.CACHED.to_counter(registry)
        self._generated = Tokens.GENERATED.to_counter(registry)
        # Explanations
        self.explanations = ExplanationMetrics(registry)
        # HTTP
        self._http_requests = Http.REQUESTS.to_counter(registry)
        self._http_in_flight = Http.IN_FLIGHT.to_gauge(registry)
        for route in GENERATING_ROUTES:
            self._begin_with(route)

    def _begin_with(self, route: str) -> None:
        self._accepted.labels(route)
        self._failed.labels(route)
        self.first_token.labels(route)
        self.per_output_token.labels(route)
        for reason in FINISH_REASONS:
            self._finished.labels(route, reason)
        for reason in get_args(AbortReason):
            self._aborted.labels(route, reason)
        for reason in COMMON_REJECTIONS:
            self._rejected.labels(route, reason)
        for outcome in get_args(Outcome):
            self.request.labels(route, outcome)

    def accepted(self, route: str, num_prompt_tokens: int) -> None:
        """A request was admitted."""
        self._accepted.labels(route).inc()
        self._prompt.inc(num_prompt_tokens)

    def began(self, route: str, request_id: str, first_token_s: float) -> None:
        """A request's first token came, so long after the request."""
        self.first_token.labels(route).observe(first_token_s, exemplar(request_id))

    def sequence_began(self, request_id: str, queue_s: float, prefill_s: float) -> None:
        """A sequence's first token came."""
        named = exemplar(request_id)
        self._queue.observe(queue_s, named)
        self._prefill.observe(prefill_s, named)

    def sequence_ended(self, route: str, request_id: str, decode_s: float, num_tokens: int) -> None:
        """A sequence was answered to its end; it took `decode_s` from its first token to its
        last."""
        named = exemplar(request_id)
        self._decode.observe(decode_s, named)
        if num_tokens > 1:
            self.per_output_token.labels(route).observe(decode_s / (num_tokens - 1), named)

    def ended(
        self,
        route: str,
        request_id: str,
        outcome: Outcome,
        reason: str,
        *,
        duration_s: float,
        num_cached: int,
    ) -> None:
        """An admitted request ended; called once for each. `reason` counts unless it failed;
        `num_cached` tokens of its prompts were in the cache."""
        named = exemplar(request_id)
        if outcome == "finished":
            self._finished.labels(route, reason).inc(exemplar=named)
        elif outcome == "aborted":
            self._aborted.labels(route, reason).inc(exemplar=named)
        else:
            self._failed.labels(route).inc(exemplar=named)
        self.request.labels(route, outcome).observe(duration_s, named)
        self._cached.inc(num_cached)

    def rejected(self, route: str, reason: str) -> None:
        """A request was refused at the door."""
        self._rejected.labels(route, reason).inc()

    def slow_reader(self) -> None:
        """A connection was closed because its client took nothing."""
        self._slow_readers.inc()

    def generated(self, num_tokens: int) -> None:
        """Tokens came from the engine."""
        self._generated.inc(num_tokens)

    def http_began(self) -> None:
        """An HTTP request came."""
        self._http_in_flight.inc()

    def http_ended(self, route: str, method: str, status: int | None) -> None:
        """Its response ended, or its client went away."""
        self._http_in_flight.dec()
        method = method if method in _METHODS else "other"
        self._http_requests.labels(route, method, "none" if status is None else status).inc()

    def watch(self, described: Described, value: Callable[[], float]) -> None:
        """Show a number as it is when someone asks."""
        described.to_gauge(self.registry).set_function(value)

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics as Prometheus text, or as OpenMetrics when `accept` (the header) asks,
        and the content type. Everything is read at one moment, so that the laws hold; it is
        written a metric at a time, so that streams go on meanwhile: all of it takes as long as a
        step of a small model."""
        encoder, content_type = choose_encoder(accept)
        pieces = []
        for family in list(self.registry.collect()):
            pieces.append(encoder(_OneFamily(family)).removesuffix(_END))
            await asyncio.sleep(0)
        if content_type.startswith("application/openmetrics-text"):
            pieces.append(_END)
        return b"".join(pieces), content_type


class ExplanationMetrics:
    """POST /explain; accepted = ended + in flight, by a law of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._accepted = Explain.ACCEPTED.to_counter(registry)
        self._ended = Explain.REQUESTS.to_counter(registry)
        for outcome in get_args(ExplainOutcome):
            self._ended.labels(outcome)
        self._in_flight = Explain.IN_FLIGHT.to_gauge(registry)
        self._compute_s = Explain.COMPUTE.to_counter(registry)

    def accepted(self) -> None:
        """One was admitted."""
        self._accepted.inc()
        self._in_flight.inc()

    def ended(self, outcome: ExplainOutcome, compute_s: float) -> None:
        """One ended; called once for each."""
        self._in_flight.dec()
        self._ended.labels(outcome).inc()
        self._compute_s.inc(compute_s)


class _OneFamily(Collector):
    """A registry of one metric, for the library's encoders."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


_END = b"# EOF\n"
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
