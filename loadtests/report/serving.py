"""Servers of its own for the report, and Locust against them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loadtests.faults.common import target
from loadtests.load.goodput import NEEDED_SHARE, search
from loadtests.load.run import Plan, Ran, run
from loadtests.load.statistics import Slo
from loadtests.report.records import Closed, Limits, Open, Served

DRAIN_S = 5
WARM_S = 2
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the served sweep asks for and how long."""

    prompt_len: int
    output_len: int
    slo: Slo
    users: tuple[int, ...]
    rate_shares: tuple[float, ...]  # of the most requests/s that the closed loops saw
    closed_s: int
    open_s: int
    probes: int  # further rates, between the best good and the worst bad


@contextmanager
def server(flags: list[str], url: str | None = None) -> Iterator[str]:
    """The URL of a server with these flags, warm; ended afterwards."""
    given = argparse.Namespace(url=url, engine_pid=None, log=None, serve="")
    with target(given, *flags) as running:
        run(running.url, Plan(WARM_S, users=4, prompt_len=16, output_len=8, drain_s=DRAIN_S))
        yield running.url


def sweep(url: str, traffic: Traffic, say: Say) -> Served:
    """Closed loops at every number of users, open ones around the rate that these reached, and the
    goodput between them."""
    cores: list[float] = []

    def point(plan: Plan) -> Ran:
        ran = run(url, plan)
        cores.append(ran.client_cores)
        return ran

    lengths = {"prompt_len": traffic.prompt_len, "output_len": traffic.output_len}
    closed = []
    for users in traffic.users:
        say(f"{users} users, one request after the other")
        # Few users send few requests: every run has to hold some.
        ran = point(Plan(traffic.closed_s, users=users, seed=users, **lengths))
        closed.append(Closed(users, ran.point(traffic.slo)))
    most = max(one.point.tokens_per_s for one in closed) / traffic.output_len
    tried: list[Open] = []

    def share_at(rate: float) -> float:
        say(f"{rate:.2f} requests/s at random moments")
        plan = Plan(traffic.open_s, rate=rate, seed=len(tried), drain_s=DRAIN_S, **lengths)
        measured = point(plan).point(traffic.slo)
        tried.append(Open(rate, measured))
        return measured.slo_share or 0.0

    for share in traffic.rate_shares:
        share_at(share * most)
    good, bad = _edges(tried)
    if good is None or bad is None or good < bad:
        found = search(share_at, _next(good, bad), max_probes=traffic.probes)
        good, bad = _edges(tried)
        del found  # `tried` has it all
    return Served(
        closed=closed,
        open=sorted(tried, key=lambda one: one.rate),
        ttft_slo_s=traffic.slo.ttft_s,
        tpot_slo_s=traffic.slo.tpot_s,
        goodput=good,
        broke_at=bad,
        client_cores=max(cores),
        **lengths,
    )


def _edges(tried: list[Open]) -> tuple[float | None, float | None]:
    """The lowest rate that broke the SLO, and the highest below it that met it."""
    bad = [one.rate for one in tried if (one.point.slo_share or 0.0) < NEEDED_SHARE]
    lowest = min(bad, default=None)
    good = [
        one.rate
        for one in tried
        if (one.point.slo_share or 0.0) >= NEEDED_SHARE and (lowest is None or one.rate < lowest)
    ]
    return max(good, default=None), lowest


def _next(good: float | None, bad: float | None) -> float:
    """Where to look first."""
    if good is not None and bad is not None:
        return float((good * bad) ** 0.5)
    if good is not None:
        return good * 1.5
    return (bad or 2.0) / 2


def limits_at(
    flags: list[str], max_num_seqs: int, max_batched_tokens: int, traffic: Traffic, users: int
) -> Limits:
    """A server with other limits under `users`, prompts and answers of mixed lengths."""
    own = ["--max-num-seqs", str(max_num_seqs), "--max-batched-tokens", str(max_batched_tokens)]
    plan = Plan(
        traffic.closed_s,
        users=users,
        workload="mixed",
        prompt_len=traffic.prompt_len,
        output_len=traffic.output_len,
        seed=max_num_seqs,
    )
    with server([*flags, *own]) as url:
        point = run(url, plan).point(traffic.slo)
    return Limits(max_num_seqs, max_batched_tokens, users, point)
