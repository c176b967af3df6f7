"""Percentiles, windows, SLOs, and the search for the goodput."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from loadtests.load.goodput import search
from loadtests.load.samples import Sample, SampleFile, read_samples
from loadtests.load.statistics import Slo, percentile, spread, summarize

S = 10**9


def sample(
    due_s: float, first_s: float, gap_s: float, tokens: int, *, failure: str = "", status: int = 200
) -> Sample:
    stamps = [int((first_s + gap_s * place) * S) for place in range(tokens)]
    return Sample(
        "/generate",
        int(due_s * S),
        int(due_s * S),
        status=status,
        first_ns=stamps[0],
        end_ns=stamps[-1],
        stamps_ns=stamps,
        counts=[1] * tokens,
        num_tokens=tokens,
        prompt_tokens=10,
        failure=failure,
    )


@pytest.mark.parametrize("count", [1, 2, 3, 100, 101])
@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 100])
def test_percentiles_are_numpys(count: int, percent: float) -> None:
    values = [random.Random(count).gauss() for _ in range(count)]
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_nothing_has_no_percentile() -> None:
    assert percentile([], 50) is None
    assert spread([None]).p99_s is None


def test_a_streams_times() -> None:
    one = sample(1.0, 1.5, 0.1, 5)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.tpot_s == pytest.approx(0.1)
    assert one.e2el_s == pytest.approx(0.9)
    assert one.gaps_s == pytest.approx([0.1] * 4)
    # Events of several tokens: four tokens after the first event in 0.2 s.
    one.stamps_ns, one.counts = [0, S // 10, S // 5], [1, 2, 2]
    assert one.tpot_s == pytest.approx(0.05)
    one.stamps_ns, one.counts = [0], [5]
    assert one.tpot_s is None


def test_a_window_counts_tokens_when_they_came_and_requests_when_they_were_due() -> None:
    samples = [
        sample(0.0, 0.5, 0.5, 5),  # 0.5 .. 2.5: three of its tokens in [1, 2.1)
        sample(1.0, 1.5, 0.5, 2),  # 1.5, 2.0
        sample(2.5, 3.0, 0.5, 1),
    ]
    point = summarize(samples, 1 * S, int(2.1 * S))
    assert point.requests == point.completed == 1
    assert point.tokens_per_s == pytest.approx(5 / 1.1)
    assert point.ttft.p50_s == pytest.approx(0.5)
    assert point.prompt_tokens_per_s == pytest.approx(10 / 1.1)


def test_refused_failed_and_cut_are_told_apart_and_meet_no_slo() -> None:
    cut = sample(0.3, 0.4, 0.01, 3)
    cut.was_cut = True
    samples = [
        sample(0.0, 0.1, 0.01, 3),
        sample(0.1, 0.2, 0.01, 3, failure="usage says"),
        sample(0.2, 0.3, 0.01, 3, failure="status 429", status=429),
        cut,
        sample(0.4, 2.0, 0.01, 3),  # late
        sample(0.5, 0.6, 0.2, 3),  # slow
    ]
    point = summarize(samples, 0, S, Slo(0.5, 0.05))
    assert (point.requests, point.completed, point.failed) == (6, 3, 1)
    assert (point.refused, point.cut) == (1, 1)
    assert point.slo_share == pytest.approx(1 / 6)


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    file = SampleFile(tmp_path)
    later, earlier = sample(1.0, 1.5, 0.1, 3), sample(0.5, 0.6, 0.1, 2)
    file.write(later)
    file.write(earlier)
    file.close()
    assert read_samples(tmp_path) == [earlier, later]


@pytest.mark.parametrize("capacity", [0.3, 3.9, 4.0, 7.0, 100.0])
def test_the_search_ends_beside_the_capacity(capacity: float) -> None:
    tried: list[float] = []

    def share_at(rate: float) -> float:
        tried.append(rate)
        return 1.0 if rate <= capacity else 0.5

    found = search(share_at, 4.0, tolerance=0.1, max_probes=20)
    assert found.rate is not None
    assert found.broke_at is not None
    assert found.rate <= capacity < found.broke_at <= found.rate * 1.1
    assert len(tried) < math.log2(100) + 6


def test_the_search_says_what_it_did_not_find() -> None:
    assert search(lambda _: 1.0, 1.0, max_probes=3).broke_at is None
    assert search(lambda _: 0.0, 1.0, max_probes=3).rate is None
