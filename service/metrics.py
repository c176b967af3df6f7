"""The whole metric vocabulary, described in one place.

A request ends in exactly one way (law 1):
accepted = finished + aborted + failed + in flight, at every moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from service.engine.messages import EngineStats
from service.health import CAUSES, STATES, EngineHealth

Outcome = Literal["finished", "aborted", "failed"]
# Why nobody waits for an answer any more: its client went away; its client took nothing of what
# was waiting for too long; its client went away and did not come back within `detach_s`.
AbortReason = Literal["client-gone", "slow-reader", "detach-expired"]

# How an explanation ended: answered; nobody waited any more; the server failed; not within its
# time beside the streams; what was asked for cannot be shown of the text.
ExplainOutcome = Literal["finished", "aborted", "failed", "timeout", "refused"]


class Metrics:
    """Counters of one server; its own registry, so that two in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._accepted = self._counter("requests_accepted", "Requests admitted to the engine.")
        self._finished = self._counter(
            "requests_finished", "Requests answered to the end, by why they ended.", "reason"
        )
        self._aborted = self._counter(
            "requests_aborted", "Requests that nobody waited for any more, by why.", "reason"
        )
        for reason in get_args(AbortReason):
            self._aborted.labels(reason)
        self._slow_readers = self._counter(
            "slow_readers", "Connections closed because their clients took nothing."
        )
        self._failed = self._counter("requests_failed", "Requests that ended with an error.")
        self._rejected = self._counter(
            "requests_rejected", "Requests refused before they were admitted, by why.", "reason"
        )
        self._in_flight = Gauge(
            "vitrine_requests_in_flight",
            "Requests admitted and not ended yet.",
            registry=self.registry,
        )
        self._prompt = self._counter("prompt_tokens", "Tokens of the prompts admitted.")
        self._generated = self._counter(
            "generated_tokens", "Tokens generated for clients, stop strings' included."
        )
        self.explanations = ExplanationMetrics(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"vitrine_{name}", text, labels, registry=self.registry)

    def accepted(self, num_prompt_tokens: int) -> None:
        """A request was admitted."""
        self._accepted.inc()
        self._in_flight.inc()
        self._prompt.inc(num_prompt_tokens)

    def ended(self, outcome: Outcome, reason: str) -> None:
        """An admitted request ended; called once for each. `reason` counts unless it failed."""
        self._in_flight.dec()
        if outcome == "finished":
            self._finished.labels(reason).inc()
        elif outcome == "aborted":
            self._aborted.labels(reason).inc()
        else:
            self._failed.inc()

    def rejected(self, reason: str) -> None:
        """A request was refused at the door."""
        self._rejected.labels(reason).inc()

    def slow_reader(self) -> None:
        """A connection was closed because its client took nothing."""
        self._slow_readers.inc()

    def generated(self, num_tokens: int) -> None:
        """Tokens came from the engine."""
        self._generated.inc(num_tokens)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a number as it is when someone asks."""
        gauge = Gauge(f"vitrine_{name}", text, registry=self.registry)
        gauge.set_function(value)

    def watch_engine(
        self, stats: Callable[[], EngineStats], health: Callable[[], EngineHealth]
    ) -> None:
        """Show the engine's own numbers, as they are when someone asks."""
        self.registry.register(_EngineCollector(stats))
        self.registry.register(_HealthCollector(health))

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics as Prometheus text, or as OpenMetrics when `accept` (the header) asks,
        and the content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


class ExplanationMetrics:
    """POST /explain; accepted = ended + in flight, by a law of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._accepted = Counter(
            "vitrine_explain_accepted", "Explanations admitted.", registry=registry
        )
        self._ended = Counter(
            "vitrine_explain_requests",
            "Explanations that ended, by how.",
            ["outcome"],
            registry=registry,
        )
        for outcome in get_args(ExplainOutcome):
            self._ended.labels(outcome)
        self._in_flight = Gauge(
            "vitrine_explain_in_flight", "Explanations admitted and not ended.", registry=registry
        )
        self._compute_s = Counter(
            "vitrine_explain_compute_seconds",
            "Time that the engine computed explanations.",
            registry=registry,
        )

    def accepted(self) -> None:
        """One was admitted."""
        self._accepted.inc()
        self._in_flight.inc()

    def ended(self, outcome: ExplainOutcome, compute_s: float) -> None:
        """One ended; called once for each."""
        self._in_flight.dec()
        self._ended.labels(outcome).inc()
        self._compute_s.inc(compute_s)


class _EngineCollector(Collector):
    """Reads `EngineStats` at every scrape."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        gauges = [
            ("sequences_running", "Sequences in the batch.", stats.num_running),
            ("sequences_waiting", "Sequences in the engine's queue.", stats.num_waiting),
            ("last_step_seconds", "Duration of the last step.", stats.step_s),
            ("last_step_tokens", "Tokens computed in the last step.", stats.step_tokens),
        ]
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"vitrine_engine_{name}", text, value)
        blocks = GaugeMetricFamily(
            "vitrine_kv_blocks", "Blocks of the KV cache, by state.", labels=["state"]
        )
        blocks.add_metric(["free"], stats.free_blocks)
        blocks.add_metric(["referenced"], stats.referenced_blocks)
        blocks.add_metric(["cached"], stats.cached_blocks)
        yield blocks
        yield GaugeMetricFamily(
            "vitrine_kv_blocks_total", "Blocks of the KV cache.", stats.total_blocks
        )
        counters = [
            ("steps", "Steps of the engine.", stats.steps),
            ("preemptions", "Sequences put back to make room.", stats.preemptions),
            ("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens),
            ("generated_tokens", "Tokens sampled.", stats.generated_tokens),
        ]
        for name, text, value in counters:
            yield CounterMetricFamily(f"vitrine_engine_{name}", text, value)


class _HealthCollector(Collector):
    """Reads `EngineHealth` at every scrape."""

    def __init__(self, health: Callable[[], EngineHealth]) -> None:
        self._health = health

    def collect(self) -> Iterator[Metric]:
        health = self._health()
        states = GaugeMetricFamily(
            "vitrine_engine_state", "1 for the state the engine is in.", labels=["state"]
        )
        for state in STATES:
            states.add_metric([state], float(state == health.state))
        yield states
        yield GaugeMetricFamily(
            "vitrine_engine_heartbeat_age_seconds",
            "Time since the engine was last heard.",
            health.heartbeat_age_s,
        )
        restarts = CounterMetricFamily(
            "vitrine_engine_restarts",
            "Engines replaced, by why: it ended, stalled, sent nonsense, could not start.",
            labels=["cause"],
        )
        for cause in CAUSES:
            restarts.add_metric([cause], health.restarts.get(cause, 0))
        yield restarts
