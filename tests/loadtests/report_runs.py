"""Runs as a report would have measured them: numbers made up, in the right proportions."""

from __future__ import annotations

import json

from loadtests.load.statistics import Point, Spread
from loadtests.report.records import (
    SCHEMA,
    Closed,
    Counted,
    Host,
    Limits,
    Offline,
    Open,
    Roof,
    Run,
    Served,
    Where,
)
from model.checkpoint_files import bundled_checkpoint
from model.families.published import PUBLISHED

CPU = Host("Some CPU, 2 cores", "Some CPU", 2, None, "2.13.0", "abc1234", "2026-11-21T20:00+00:00")
GPU = Host(
    "NVIDIA H100 80GB HBM3",
    "Some CPU",
    16,
    "NVIDIA H100 80GB HBM3",
    "2.13.0",
    "abc1234",
    "2026-11-21T20:00+00:00",
)


def spread(p50_s: float) -> Spread:
    return Spread(1.1 * p50_s, p50_s, 2 * p50_s, 3 * p50_s, 100)


def point(tokens_per_s: float, ttft_s: float, itl_s: float, slo_share: float = 1.0) -> Point:
    return Point(
        window_s=10.0,
        requests=100,
        completed=100,
        failed=0,
        refused=0,
        cut=0,
        failures=(),
        requests_per_s=10.0,
        tokens_per_s=tokens_per_s,
        prompt_tokens_per_s=tokens_per_s,
        cached_share=0.0,
        ttft=spread(ttft_s),
        itl=spread(itl_s),
        tpot=spread(itl_s),
        e2el=spread(ttft_s + 64 * itl_s),
        late=spread(0.0002),
        slo_share=slo_share,
    )


def served(speed: float) -> Served:
    """A server that does `speed` tokens/s for one user, and ten times as many at best."""
    growth = {1: 1.0, 4: 3.0, 16: 7.0, 64: 10.0}
    rates = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
    most = 10 * speed / 64
    return Served(
        prompt_len=64,
        output_len=64,
        ttft_slo_s=0.5,
        tpot_slo_s=0.05,
        closed=[
            Closed(users, point(speed * times, 0.02 * users, users / speed / times))
            for users, times in growth.items()
        ],
        open=[
            Open(
                share * most,
                point(share * speed, 0.02 / (1.3 - share) ** 2, 1 / speed, 1.0 - (share > 0.7)),
            )
            for share in rates
        ],
        goodput=0.6 * most,
        broke_at=0.8 * most,
        client_cores=0.1,
    )


def offline(speed: float) -> list[Offline]:
    return [
        Offline(batch, 64, 64, speed * batch**0.8, speed, 2000.0, 0.01, 0.009, 0.0005, 0.0005, 0.0)
        for batch in (1, 8, 32)
    ]


SECONDS = {
    "embedding": 0.0001,
    "Q, K, V products": 0.002,
    "attention": 0.001,
    "output product": 0.0007,
    "MLP": 0.004,
    "head": 0.003,
    "norms, residuals, threads": 0.0005,
    "sampling": 0.0003,
    "host": 0.0004,
}


def make_run(model: str, *, on_gpu: bool = False, with_limits: bool = False) -> Run:
    """`model` is stories or a published shape."""
    if model == "stories":
        config = json.loads((bundled_checkpoint() / "config.json").read_text())
    else:
        config = PUBLISHED[model]
    speed = {"stories": 900.0}.get(model, 90.0) * (40 if on_gpu else 1)
    limits = [
        Limits(seqs, tokens, 96, point(speed * seqs**0.5, 1 / seqs, 0.01 * seqs**0.5))
        for seqs, tokens in [(4, 1024), (16, 1024), (64, 1024), (64, 128), (64, 4096)]
    ]
    return Run(
        schema=SCHEMA,
        host=GPU if on_gpu else CPU,
        device="cuda" if on_gpu else "cpu",
        model=model,
        config=config,
        dtype="bfloat16",
        mode="quick",
        roof=Roof(2.9e12, 700e12) if on_gpu else Roof(45e9, 500e9),
        offline=offline(speed),
        served=served(speed),
        where=[Where(batch, 128, "by hand", SECONDS) for batch in (1, 32)],
        counted=[Counted("decode", 2.0e8, 2.0e8, 2.5e8, 2.5e8)],
        limits=limits if with_limits else [],
    )
