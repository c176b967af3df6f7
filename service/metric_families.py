"""How a metric is described, and how that becomes one that prometheus_client shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from service.buckets import Distribution

PREFIX = "vitrine_"
# OpenMetrics bounds an exemplar's labels and their values together (1.0, "Exemplars").
_MAX_EXEMPLAR_CHARS = 128
_EXEMPLAR_LABEL = "request_id"

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Described:
    """One metric: what it is called, what it says, and its labels. A counter's name ends in
    `_total` where it is shown."""

    kind: Kind
    name: str  # without the prefix and without _total
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """As queries have it; a histogram's, without _bucket, _sum and _count."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    def to_counter(self, registry: CollectorRegistry) -> Counter:
        """One of the library's."""
        return Counter(PREFIX + self.name, self.text, self.labels, registry=registry)

    def to_gauge(self, registry: CollectorRegistry) -> Gauge:
        """One of the library's."""
        return Gauge(PREFIX + self.name, self.text, self.labels, registry=registry)

    def to_histogram(self, registry: CollectorRegistry) -> Histogram:
        """One of the library's."""
        return Histogram(
            PREFIX + self.name, self.text, self.labels, registry=registry, buckets=self.buckets
        )

    def show(
        self, *values: tuple[tuple[str, ...], float]
    ) -> CounterMetricFamily | GaugeMetricFamily:
        """Values that are kept elsewhere, each with its labels' values, as of now."""
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(PREFIX + self.name, self.text, labels=self.labels)
        for labels, value in values:
            family.add_metric(labels, value)
        return family

    def show_value(self, value: float) -> CounterMetricFamily | GaugeMetricFamily:
        """The same of one without labels."""
        return self.show(((), value))

    def show_distributions(
        self, values: Iterable[tuple[tuple[str, ...], Distribution]]
    ) -> HistogramMetricFamily:
        """Distributions that are kept elsewhere, as a histogram."""
        family = HistogramMetricFamily(PREFIX + self.name, self.text, labels=self.labels)
        for labels, distribution in values:
            cumulative, num_values = [], 0
            for bound, count in zip(
                [*distribution.bounds, float("inf")], distribution.counts, strict=True
            ):
                num_values += count
                cumulative.append((_written(bound), float(num_values)))
            family.add_metric(labels, cumulative, distribution.total)
        return family


def _written(bound: float) -> str:
    """As the library writes it."""
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]


def counter(name: str, text: str, *labels: str) -> Described:
    """Something that only grows."""
    return Described("counter", name, text, labels)


def gauge(name: str, text: str, *labels: str) -> Described:
    """Something as it is now."""
    return Described("gauge", name, text, labels)


def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Described:
    """How many values were under each of `buckets`."""
    return Described("histogram", name, text, labels, buckets)


def exemplar(request_id: str) -> dict[str, str] | None:
    """The labels by which a sample names one of the requests in it; None for an id that is
    longer than an exemplar may be."""
    fits = len(_EXEMPLAR_LABEL) + len(request_id) <= _MAX_EXEMPLAR_CHARS
    return {_EXEMPLAR_LABEL: request_id} if fits else None
