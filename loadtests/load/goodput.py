"""Goodput: the highest rate of arrivals at which 99 percent of the requests meet the SLO.

    python -m loadtests.load.goodput --ttft-ms 500 --tpot-ms 50
    python -m loadtests.load.goodput --url http://127.0.0.1:8000 --probe-s 60

Open loop: requests come at random moments whether or not the server keeps up. The limits are each
request's time to first token and its mean time of a token after that; a request that fails, is
refused or does not end in time meets neither. Without --url a server of the bundled model (or
--model) is started.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from loadtests.faults.common import add_server_arguments, target
from loadtests.load.run import Plan, run
from loadtests.load.statistics import Point, Slo
from loadtests.load.workloads import KINDS

NEEDED_SHARE = 0.99
FACTOR = 2.0
DRAIN_S = 20
WARM_S = 2


@dataclass(frozen=True, slots=True)
class Found:
    """`rate` met the SLO, `broke_at` did not; None: no rate that was tried did."""

    rate: float | None
    broke_at: float | None


def search(
    share_at: Callable[[float], float],
    start: float,
    *,
    tolerance: float = 0.1,
    max_probes: int = 12,
    needed: float = NEEDED_SHARE,
) -> Found:
    """Double or halve from `start` until one rate is good and one is not, then halve the distance
    between them (of their logarithms) until it is within `tolerance`. `share_at` measures the
    share of requests that met the SLO at a rate."""
    good: float | None = None
    bad: float | None = None
    rate = start
    for _ in range(max_probes):
        if share_at(rate) >= needed:
            good = rate
        else:
            bad = rate
        if good is None or bad is None:
            rate = rate * FACTOR if bad is None else rate / FACTOR
        elif bad / good <= 1 + tolerance:
            break
        else:
            rate = math.sqrt(good * bad)
    return Found(good, bad)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.load.goodput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server_arguments(parser)
    parser.add_argument("--model", help="of the server that is started; else the bundled one")
    parser.add_argument("--ttft-ms", type=float, default=500.0)
    parser.add_argument("--tpot-ms", type=float, default=50.0)
    parser.add_argument("--workload", choices=KINDS, default="mixed")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--start", type=float, default=4.0, help="requests/s, the first rate tried")
    parser.add_argument("--probe-s", type=int, default=30, help="length of each try")
    parser.add_argument("--tolerance", type=float, default=0.1, help="of the rate, relative")
    parser.add_argument("--max-probes", type=int, default=12)
    parser.add_argument("--processes", type=int, default=1, help="of the client")
    given = parser.parse_args()
    model = [] if given.model is None else ["--model", given.model]
    with target(given, *model) as server:
        return _find(server.url, given)


def _find(url: str, given: argparse.Namespace) -> int:
    slo = Slo(given.ttft_ms / 1e3, given.tpot_ms / 1e3)
    console, tried = Console(), list[tuple[float, Point]]()
    run(url, Plan(WARM_S, users=8, prompt_len=16, output_len=16, drain_s=DRAIN_S))

    def share_at(rate: float) -> float:
        plan = Plan(
            given.probe_s,
            rate=rate,
            drain_s=DRAIN_S,
            workload=given.workload,
            prompt_len=given.prompt_len,
            output_len=given.output_len,
            processes=given.processes,
            seed=(given.seed or 0) + len(tried),
        )
        point = run(url, plan).point(slo)
        tried.append((rate, point))
        share = point.slo_share or 0.0
        console.print(f"{rate:8.2f} requests/s: {share:6.1%} of {point.requests} met the SLO")
        return share

    found = search(share_at, given.start, tolerance=given.tolerance, max_probes=given.max_probes)
    console.print(_table(tried, slo))
    if given.out is not None:
        content = {
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "settings": {
                name: getattr(given, name)
                for name in ("model", "serve", "workload", "prompt_len", "output_len", "probe_s")
            },
            "slo": asdict(slo),
            "found": asdict(found),
            "tried": [{"rate": rate, **asdict(point)} for rate, point in tried],
        }
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(content, indent=1) + "\n")
    if found.rate is None:
        console.print("no rate that was tried met the SLO")
        return 1
    until = (
        "no rate that was tried broke it"
        if found.broke_at is None
        else (f"{found.broke_at:.2f} broke it")
    )
    console.print(f"goodput {found.rate:.2f} requests/s; {until}")
    return 0


def _table(tried: list[tuple[float, Point]], slo: Slo) -> Table:
    title = f"TTFT within {1e3 * slo.ttft_s:g} ms, then {1e3 * slo.tpot_s:g} ms a token"
    table = Table(title=title, title_justify="left")
    for name in ("requests/s", "met", "requests", "TTFT p99, ms", "TPOT p99, ms", "tokens/s"):
        table.add_column(name, justify="right")
    for rate, point in sorted(tried, key=lambda pair: pair[0]):
        table.add_row(
            f"{rate:.2f}",
            f"{point.slo_share or 0:.1%}",
            f"{point.requests}",
            f"{1e3 * (point.ttft.p99_s or math.nan):,.1f}",
            f"{1e3 * (point.tpot.p99_s or math.nan):,.2f}",
            f"{point.tokens_per_s:,.0f}",
        )
    return table


if __name__ == "__main__":
    raise SystemExit(main())
