"""From samples to the numbers of a point. Plain Python.

The field's words: TTFT, from when a request was due to its first token; ITL, each pause between two
events with tokens; TPOT, a request's mean time of a token after the first event; E2EL, from when it
was due to its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtests.load.samples import Sample

NS = 1e9


@dataclass(frozen=True, slots=True)
class Slo:
    """What a user puts up with: a wait for the first token and a mean wait for each further one."""

    ttft_s: float
    tpot_s: float

    def is_met(self, sample: Sample) -> bool:
        """A request that failed, was refused or did not end met nothing."""
        if sample.failure or sample.was_cut or sample.ttft_s is None:
            return False
        return sample.ttft_s <= self.ttft_s and (sample.tpot_s or 0.0) <= self.tpot_s


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds. None: there was nothing to measure."""

    mean_s: float | None
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Point:
    """One load, in numbers; of the requests that were due within the window."""

    window_s: float
    requests: int
    completed: int
    failed: int  # integrity, errors, cut connections
    refused: int  # 429 and 503
    cut: int  # the run ended before they did
    failures: tuple[str, ...]  # the first few in words
    requests_per_s: float  # completed
    tokens_per_s: float  # that came within the window
    prompt_tokens_per_s: float
    cached_share: float  # of the prompt tokens
    ttft: Spread
    itl: Spread
    tpot: Spread
    e2el: Spread
    late: Spread  # sent after it was due: what the client itself added
    slo_share: float | None  # of the requests due that met it


def percentile(values: Iterable[float], percent: float) -> float | None:
    """Linear between the two nearest ranks, as numpy has it; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100
    low, share = math.floor(place), place - math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * share


def spread(values: Iterable[float | None]) -> Spread:
    """Mean and percentiles of what is known."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return Spread(None, None, None, None, 0)
    cuts = [percentile(known, percent) for percent in (50, 90, 99)]
    return Spread(math.fsum(known) / len(known), *cuts, len(known))


def summarize(
    samples: Sequence[Sample], begin_ns: int, end_ns: int, slo: Slo | None = None
) -> Point:
    """The window [begin, end) of a run. A closed loop's throughput counts every token that came in
    it, also of streams that began before or were cut at the end."""
    due = [one for one in samples if begin_ns <= one.due_ns < end_ns]
    ended = [one for one in due if one.end_ns is not None and not one.failure and not one.was_cut]
    window_s = (end_ns - begin_ns) / NS
    tokens = sum(
        count
        for one in samples
        for stamp, count in zip(one.stamps_ns, one.counts, strict=True)
        if begin_ns <= stamp < end_ns
    )
    begun = [one for one in samples if one.first_ns and begin_ns <= one.first_ns < end_ns]
    prompts = sum(one.prompt_tokens for one in begun)
    refused = [one for one in due if one.status in (429, 503)]
    failed = [one for one in due if one.failure and one not in refused]
    return Point(
        window_s=window_s,
        requests=len(due),
        completed=len(ended),
        failed=len(failed),
        refused=len(refused),
        cut=sum(one.was_cut for one in due),
        failures=tuple(one.failure[:300] for one in failed[:5]),
        requests_per_s=sum(begin_ns <= (one.end_ns or 0) < end_ns for one in samples) / window_s,
        tokens_per_s=tokens / window_s,
        prompt_tokens_per_s=prompts / window_s,
        cached_share=sum(one.cached_prompt_tokens for one in begun) / prompts if prompts else 0.0,
        ttft=spread(one.ttft_s for one in due),
        itl=spread(gap for one in due for gap in one.gaps_s),
        tpot=spread(one.tpot_s for one in ended),
        e2el=spread(one.e2el_s for one in ended),
        late=spread((one.sent_ns - one.due_ns) / NS for one in due),
        slo_share=None if slo is None or not due else sum(map(slo.is_met, due)) / len(due),
    )
