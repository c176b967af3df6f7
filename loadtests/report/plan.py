"""What is measured: quick, in five minutes on two cores; full, in an hour."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loadtests.load.statistics import Slo
from loadtests.report.serving import Traffic

BUNDLED = "stories"


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to run the report. Batches are of the engine alone."""

    name: str
    models: tuple[str, ...]
    offline_only: tuple[str, ...]  # too large to be served in the time there is
    batches: tuple[int, ...]
    repeats: int
    bench_output_len: int
    where_batches: tuple[int, ...]
    traffic: Traffic
    limits: tuple[tuple[int, int], ...]  # (max_num_seqs, max_batched_tokens)
    limit_users: int


def quick(slo: Slo) -> Mode:
    """Few points, short ones: the shapes of the curves are right, their last digit is not."""
    return Mode(
        name="quick",
        models=(BUNDLED, "gpt2"),
        offline_only=(),
        batches=(1, 8, 32),
        repeats=1,
        bench_output_len=32,
        where_batches=(1, 32),
        traffic=Traffic(
            prompt_len=64,
            output_len=48,
            slo=slo,
            users=(1, 4, 16, 64),
            rate_shares=(0.3, 0.6, 0.9, 1.2),
            closed_s=6,
            open_s=6,
            probes=1,
        ),
        limits=(),
        limit_users=0,
    )


def full(slo: Slo) -> Mode:
    """Every point long enough for a p99."""
    return Mode(
        name="full",
        models=(BUNDLED, "gpt2", "qwen3-0.6b"),
        offline_only=("qwen3-8b",),
        batches=(1, 2, 4, 8, 16, 32, 64),
        repeats=3,
        bench_output_len=128,
        where_batches=(1, 8, 32),
        traffic=Traffic(
            prompt_len=128,
            output_len=128,
            slo=slo,
            users=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            rate_shares=(0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.2),
            closed_s=30,
            open_s=45,
            probes=6,
        ),
        limits=(),
        limit_users=0,
    )


def with_limits(mode: Mode) -> Mode:
    """The same and a server for each value of --max-num-seqs and of --max-batched-tokens, the other
    at its default, under more users than the default takes at a time."""
    seqs = [(value, 1024) for value in (4, 8, 16, 32, 64, 128, 256)]
    tokens = [(64, value) for value in (64, 128, 256, 512, 2048, 4096)]
    return replace(mode, limits=tuple(seqs + tokens), limit_users=96)


MODES = {"quick": quick, "full": full}
