"""Servers of its own for the report, and Locust against them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from loadtests.faults.common import target
from loadtests.load.goodput import NEEDED_SHARE, search
from loadtests.load.run import WARM_UP, Plan, run
from loadtests.load.statistics import Point, Slo
from loadtests.report.records import Closed, Limits, Open, Served
from loadtests.report.steps import Doing

DRAIN_S = 4
ROUNDS = 2.2  # of a closed loop, at least: every user computes a prompt and an answer
LONGEST = 5.0  # times closed_s or open_s; closed loops whose rounds take longer are left out
FEWEST = 12  # requests that an open loop is to send within its window
WARM_S = 2


class Measured(msgspec.Struct, frozen=True):
    """One Locust run."""

    point: Point
    client_cores: float


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


def sweep(url: str, traffic: Traffic, round_s: Callable[[int], float], doing: Doing) -> Served:
    """Closed loops at every number of users, open ones around the rate that these reached, and the
    goodput between them. `round_s` says about how long so many users wait for one answer each."""
    cores: list[float] = []

    def point(name: str, plan: Plan) -> Point:
        def measure() -> Measured:
            ran = run(url, plan)
            return Measured(ran.point(traffic.slo), ran.client_cores)

        measured = doing.part(name, Measured, measure)
        cores.append(measured.client_cores)
        return measured.point

    lengths = {"prompt_len": traffic.prompt_len, "output_len": traffic.output_len}
    closed = []
    for users in traffic.users:
        # A short look at users who all still wait for their first answer would say nothing.
        seconds = max(traffic.closed_s, math.ceil(ROUNDS * round_s(users)))
        if seconds > LONGEST * traffic.closed_s:
            doing.say(f"{users} users are left out: a round of theirs takes {round_s(users):.0f} s")
            break
        plan = Plan(seconds, users=users, seed=users, **lengths)
        closed.append(Closed(users, point(f"users-{users}", plan)))
    most = max(one.point.tokens_per_s for one in closed) / traffic.output_len
    tried: list[Open] = []

    def share_at(rate: float) -> float:
        needed_s = FEWEST / (1 - WARM_UP) / rate
        seconds = math.ceil(min(max(traffic.open_s, needed_s), LONGEST * traffic.open_s))
        plan = Plan(seconds, rate=rate, seed=len(tried), drain_s=DRAIN_S, **lengths)
        measured = point(f"rate-{rate:.3g}", plan)
        if not measured.requests:  # so rare that none came: nothing is known
            return 0.0
        tried.append(Open(rate, measured))
        return measured.slo_share or 0.0

    for share in traffic.rate_shares:
        share_at(share * most)
    good, bad = _edges(tried)
    search(share_at, _next(good, bad), max_probes=traffic.probes)
    good, bad = _edges(tried)
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
