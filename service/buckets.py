"""Histograms that cost little a value, and the bounds of all of them.

prometheus_client's own take a lock for each value and look at every bound: five times as long
(`python -m loadtests.metrics_cost` measures both). What is recorded for each token or step goes in
here and is shown as a histogram at a scrape; what is recorded once a request uses the library's.
"""

from __future__ import annotations

from bisect import bisect_left


class Distribution:
    """How many values fell under each of the ascending `bounds`, and what they add up to."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # not cumulative; the last: over all bounds
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count one, or as many alike; a value that is a bound is under it."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


def _decimal(steps: tuple[float, ...], first: float, last: float) -> tuple[float, ...]:
    """`steps` in every power of ten, from `first` to `last`."""
    values = [float(f"{step}e{exponent}") for exponent in range(-4, 4) for step in steps]
    return tuple(value for value in values if first <= value <= last)


# Half a millisecond is a step of a model of 5 M parameters on a CPU; a prompt of 100,000 tokens
# may take a model of 70 B a minute. Finer where goals are set: 6 bounds in a power of ten.
TOKEN_SECONDS = _decimal((1, 1.5, 2, 3, 5, 7), 0.0005, 10.0)
FIRST_TOKEN_SECONDS = _decimal((1, 1.5, 2, 3, 5, 7), 0.0005, 100.0)
REQUEST_SECONDS = _decimal((1, 2, 5), 0.0005, 1000.0)
SEQUENCES = tuple(float(2**n) for n in range(13))  # 1 .. 4096, the highest --max-num-seqs
TOKENS = tuple(float(2**n) for n in range(21))  # 1 .. 1 M, the highest --max-batched-tokens
