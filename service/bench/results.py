"""From the record of a run to the numbers of a table.

The field's words: TTFT, time from arrival to the first token; ITL, each gap between two
tokens of a request; TPOT, a request's mean gap; E2EL, from arrival to the last token.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from service.bench.measure import Run, StepRecord
from service.bench.workload import Workload
from service.engine.roofline import Roofline
from service.engine.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Result:
    """One run in numbers, or the medians of several. None: the workload has no such thing
    (no gap in outputs of one token, no step without a prompt). Of a closed loop,
    output_tokens_per_s and requests' times are of when all users were at it (`Run.steady_s`)."""

    generated_tokens: float
    prompt_tokens: float
    elapsed_s: float
    decode_tokens_per_s: float | None  # over the steps that only decode
    output_tokens_per_s: float  # from the first arrival to the last token
    prefill_tokens_per_s: float | None  # prompt tokens computed, over the steps with any
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    itl_mean_s: float | None
    itl_p50_s: float | None
    itl_p90_s: float | None
    itl_p99_s: float | None
    tpot_mean_s: float | None
    tpot_p50_s: float | None
    tpot_p90_s: float | None
    tpot_p99_s: float | None
    e2el_mean_s: float | None
    e2el_p50_s: float | None
    e2el_p90_s: float | None
    e2el_p99_s: float | None
    # Medians over the steps that only decode.
    step_s: float | None
    schedule_s: float | None
    build_s: float | None
    forward_s: float | None
    sample_s: float | None
    book_s: float | None
    host_s: float | None  # schedule, build and book
    # Over the same steps together.
    decode_batch: float | None  # sequences in one, on average
    decode_bytes_per_s: float | None
    decode_flops_per_s: float | None
    decode_roof_s: float | None  # least time of an average step on this machine
    decode_roof_share: float | None  # that, over the time it took
    prefill_flops_per_s: float | None
    prefill_roof_share: float | None
    peak_blocks: float
    preemptions: float
    cached_prompt_tokens: float
    foreign_cores: float | None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One batch size: its workload, every repeat, and their medians."""

    workload: Workload
    median: Result
    repeats: tuple[Result, ...]

    @classmethod
    def of(cls, workload: Workload, repeats: Sequence[Result]) -> Measurement:
        """Medians of each number by itself."""
        medians: dict[str, Any] = {
            field.name: _median([getattr(result, field.name) for result in repeats])
            for field in fields(Result)
        }
        return cls(workload, Result(**medians), tuple(repeats))


def summarize(run: Run, workload: Workload, traffic: Traffic, roofline: Roofline) -> Result:
    """The numbers of one run."""
    begin_s, end_s = run.steady_s(workload.batch) if workload.is_closed else (0.0, run.elapsed_s)
    counted = [r for r in run.requests if begin_s <= r.arrives_s <= end_s]
    within = sum(begin_s <= at <= end_s for r in run.requests for at in r.token_times_s)
    decodes = [step for step in run.steps if step.is_decode]
    generated = sum(len(request.token_times_s) for request in run.requests)
    parts = {
        "ttft": [r.token_times_s[0] - r.arrives_s for r in counted],
        "itl": [gap for r in counted for gap in _gaps(r.token_times_s)],
        "tpot": [
            (r.token_times_s[-1] - r.token_times_s[0]) / (len(r.token_times_s) - 1)
            for r in counted
            if len(r.token_times_s) > 1
        ],
        "e2el": [r.token_times_s[-1] - r.arrives_s for r in counted],
    }
    percentiles: dict[str, Any] = {
        f"{name}_p{percent}_s": _percentile(values, percent)
        for name, values in parts.items()
        for percent in (50, 90, 99)
    } | {
        f"{name}_mean_s": statistics.fmean(values) if values else None
        for name, values in parts.items()
    }
    times: dict[str, Any] = {
        f"{name}_s": _median([getattr(step.profile, f"{name}_s") for step in decodes])
        for name in ("step", "schedule", "build", "forward", "sample", "book", "host")
    }
    return Result(
        generated_tokens=generated,
        prompt_tokens=sum(request.prompt_len for request in run.requests),
        elapsed_s=run.elapsed_s,
        output_tokens_per_s=within / (end_s - begin_s),
        peak_blocks=max(step.profile.referenced_blocks for step in run.steps),
        preemptions=run.preemptions,
        cached_prompt_tokens=sum(request.cached_prompt_tokens for request in run.requests),
        foreign_cores=run.foreign_cores,
        **percentiles,
        **times,
        **_decode_rates(decodes, traffic, roofline),
        **_prefill_rates(run, traffic, roofline),
    )


def _decode_rates(
    decodes: list[StepRecord], traffic: Traffic, roofline: Roofline
) -> dict[str, Any]:
    names = ("tokens_per_s", "batch", "bytes_per_s", "flops_per_s", "roof_s", "roof_share")
    if not decodes:
        return dict.fromkeys((f"decode_{name}" for name in names), None)
    needs = [traffic.decode(step.contexts) for step in decodes]
    total_s = sum(step.profile.step_s for step in decodes)
    tokens = sum(len(step.contexts) for step in decodes)
    least_s = sum(roofline.least_s(*need) for need in needs)
    values = (
        tokens / total_s,
        tokens / len(decodes),
        sum(num_bytes for num_bytes, _ in needs) / total_s,
        sum(flops for _, flops in needs) / total_s,
        least_s / len(decodes),
        least_s / total_s,
    )
    return {f"decode_{name}": value for name, value in zip(names, values, strict=True)}


def _prefill_rates(run: Run, traffic: Traffic, roofline: Roofline) -> dict[str, Any]:
    """Decodes that ride along in these steps are not counted, nor is what a preemption made
    to be computed again: the operations are those of each prompt once."""
    steps = [step for step in run.steps if step.num_prompt_tokens]
    total_s = sum(step.profile.step_s for step in steps)
    flops = sum(
        traffic.prefill_flops(request.cached_prompt_tokens, request.prompt_len)
        for request in run.requests
    )
    return {
        "prefill_tokens_per_s": sum(step.num_prompt_tokens for step in steps) / total_s,
        "prefill_flops_per_s": flops / total_s,
        "prefill_roof_share": flops / total_s / roofline.flops_per_s,
    }


def _gaps(times_s: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times_s)]


def _percentile(values: list[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
