"""Metrics under the names that others expect, beside our own, when `--metric-aliases` asks for it.

- `otel`: the server metrics of OpenTelemetry's semantic conventions for generative AI
  (gen_ai.server.*, "Development" in their version 1.42), as an OpenTelemetry collector would write
  them for Prometheus: dots become underscores, the unit a suffix. The conventions recommend bounds
  of buckets that begin at 10 ms; ours are finer and stay.
- `gateway`: what the endpoint picker of the Kubernetes Gateway API Inference Extension reads to
  choose a server (its model server protocol, proposal 003), under the names of vLLM's that it looks
  for by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from service.client import Engine
from service.metric_recording import Metrics

ALIASES = ("otel", "gateway")
_PROVIDER = "vitrine"
_OPERATIONS = {"/v1/chat/completions": "chat"}


class AliasError(ValueError):
    """No such set of names; the message lists those there are."""


def parse_aliases(text: str) -> tuple[str, ...]:
    """Names with commas between them. Raises `AliasError`."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in ALIASES:
            raise AliasError(f"{name!r} is none of {', '.join(ALIASES)}")
    return names


def register_aliases(
    names: tuple[str, ...], metrics: Metrics, engine: Engine, model_name: str
) -> None:
    """Show the sets called so."""
    if "otel" in names:
        metrics.registry.register(OtelAliases(metrics, model_name))
    if "gateway" in names:
        metrics.registry.register(GatewayAliases(engine, model_name))


class OtelAliases(Collector):
    """gen_ai.server.*"""

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        self._metrics = metrics
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        for name, text, ours in (
            (
                "gen_ai_server_request_duration_seconds",
                "Duration of a request, to the last output token.",
                self._metrics.request,
            ),
            (
                "gen_ai_server_time_to_first_token_seconds",
                "Time to the first token.",
                self._metrics.first_token,
            ),
            (
                "gen_ai_server_time_per_output_token_seconds",
                "Time per output token after the first.",
                self._metrics.per_output_token,
            ),
        ):
            yield _renamed(ours.collect(), name, text, self._attributes)

    def _attributes(self, labels: Mapping[str, str]) -> dict[str, str]:
        route, outcome = labels["route"], labels.get("outcome")
        attributes = {
            "gen_ai_operation_name": _OPERATIONS.get(route, "text_completion"),
            "gen_ai_provider_name": _PROVIDER,
            "gen_ai_request_model": self._model_name,
            "http_route": route,
        }
        if outcome is not None:  # empty is absent, in Prometheus
            attributes["error_type"] = "" if outcome == "finished" else outcome
        return attributes


class GatewayAliases(Collector):
    """The queue and the KV cache, for an endpoint picker."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats, info = self._engine.stats, self._engine.info
        usage = stats.referenced_blocks / stats.total_blocks if stats.total_blocks else 0.0
        for name, text, value in (
            (
                "vllm:num_requests_waiting",
                "Sequences that wait for their first token.",
                self._engine.health.queue_requests,
            ),
            ("vllm:num_requests_running", "Sequences in the batch.", stats.num_running),
            ("vllm:kv_cache_usage_perc", "Share of the KV blocks that are referenced.", usage),
        ):
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        if info is not None:
            config = GaugeMetricFamily(
                "vllm:cache_config_info",
                "1; the sizes of the KV cache are in the labels.",
                labels=["model_name", "block_size", "num_gpu_blocks"],
            )
            config.add_metric([self._model_name, str(info.block_size), str(info.num_blocks)], 1)
            yield config


def _renamed(
    families: Iterable[Metric],
    name: str,
    text: str,
    attributes: Callable[[Mapping[str, str]], dict[str, str]],
) -> HistogramMetricFamily:
    """A histogram's samples under another name and with other labels."""
    renamed = HistogramMetricFamily(name, text)
    for family in families:
        for sample in family.samples:
            labels = attributes(sample.labels)
            if "le" in sample.labels:
                labels["le"] = sample.labels["le"]
            suffix = sample.name.removeprefix(family.name)
            renamed.samples.append(
                Sample(name + suffix, labels, sample.value, sample.timestamp, sample.exemplar)
            )
    return renamed
