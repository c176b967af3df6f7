"""Is any panel empty, any alert blind? `python -m loadtests.dashboards --seconds 60`

Starts a server and a real Prometheus with the configuration of deploy/prometheus, applies load,
kills the engine half-way, and then runs every query of every dashboard, every recording rule and
every alert's expression against what was scraped. Prints a table; exit status 1 when a query is
empty or wrong, a rule fails, or a metric that is used somewhere has no series.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
from rich.console import Console
from rich.table import Table

from loadtests.dashboards.load import apply_load
from loadtests.dashboards.prometheus import (
    Prometheus,
    PrometheusError,
    running_prometheus,
    scrape_interval_s,
)
from loadtests.dashboards.queries import interpolated, metrics_in, read_queries, read_variables
from loadtests.faults.common import PAGE_WIDTH, Target, add_server_arguments, seeded, target

ROOF_LIMIT_S = 60.0
# Small enough for the load to fill the queue.
FLAGS = ("--max-num-seqs", "8", "--max-queue-requests", "6")
# Only a server with a GPU has these.
GPU_DASHBOARD = "vitrine-gpu"
GPU_METRIC = "vitrine_device_power_watts"


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was looked at."""

    where: str
    what: str
    found: str
    verdict: str  # ok, EMPTY, ERROR, or "no GPU here"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.dashboards", description=__doc__)
    add_server_arguments(parser)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--no-kill", action="store_true", help="let the engine live")
    given = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console.width = PAGE_WIDTH
    try:
        with target(given, *FLAGS) as server:
            where = urlsplit(server.url).netloc
            with running_prometheus(where) as prometheus:
                rows = examine(given, server, prometheus, console)
    except PrometheusError as error:
        console.print(str(error), markup=False)
        return 2
    return verdict(rows, console)


def examine(
    given: argparse.Namespace, server: Target, prometheus: Prometheus, console: Console
) -> list[Row]:
    """Load, then look at everything."""
    if not _wait_for_roof(server.url):
        console.print(f"no roofline after {ROOF_LIMIT_S:g} s: its panels will be empty")
    began = time.time()
    done = asyncio.run(_load(given, server))
    console.print(f"load: {dict(sorted(done.items()))}")
    scrape_s = scrape_interval_s()
    time.sleep(2 * scrape_s)  # the last scrape, and the rules after it
    ended = time.time()
    rows = [*_queries(prometheus, began, ended, scrape_s), *_variables(prometheus)]
    rows += _rules(prometheus, began, ended, scrape_s)
    rows.append(_exemplars(prometheus, began, ended))
    return rows


async def _load(given: argparse.Namespace, server: Target) -> dict[str, int]:
    loading = asyncio.create_task(
        apply_load(server.url, given.seconds, given.clients, seeded(given)), name="load"
    )
    if not given.no_kill and server.api is not None:
        await asyncio.sleep(given.seconds / 2)
        if (engine := server.engine()) is not None:
            engine.kill()
    return dict(await loading)


def _wait_for_roof(url: str) -> bool:
    """Until the server has measured what its machine can do."""
    deadline = time.monotonic() + ROOF_LIMIT_S
    while time.monotonic() < deadline:
        if "vitrine_roofline_flops_per_second " in httpx2.get(url + "/metrics").text:
            return True
        time.sleep(0.5)
    return False


def _queries(prometheus: Prometheus, began: float, ended: float, scrape_s: float) -> Iterator[Row]:
    has_gpu = prometheus.has(GPU_METRIC)
    for query in read_queries():
        what = f"{query.panel}: {query.legend}".removesuffix(": __auto")
        expr = interpolated(query.expr, scrape_s)
        row = _over(prometheus, query.dashboard, what, expr, (began, ended, scrape_s))
        missing = [name for name in metrics_in(expr) if not prometheus.has(name)]
        if query.dashboard == GPU_DASHBOARD and not has_gpu and row.verdict == "EMPTY":
            row = Row(row.where, row.what, row.found, "no GPU here")
        elif missing:
            row = Row(row.where, row.what, f"no {', '.join(missing)}", "EMPTY")
        yield row


def _variables(prometheus: Prometheus) -> Iterator[Row]:
    for label, selector in sorted(read_variables()):
        match = selector.replace("$job", ".*")
        values = prometheus.get(f"label/{label}/values", {"match[]": match})
        yield Row("variables", f"{label} of {match}", str(values), "ok" if values else "EMPTY")


def _rules(prometheus: Prometheus, began: float, ended: float, scrape_s: float) -> Iterator[Row]:
    for rule in prometheus.rules():
        yield _rule(prometheus, rule, (began, ended, scrape_s))


def _rule(prometheus: Prometheus, rule: dict[str, Any], span: tuple[float, float, float]) -> Row:
    """A recording rule must have made a series; an alert that is silent must see what it watches:
    each metric in its expression has series."""
    where = "alerts" if rule["type"] == "alerting" else "rules"
    if rule["health"] != "ok":
        return Row(where, rule["name"], rule.get("lastError", rule["health"]), "ERROR")
    if where == "rules":
        return _over(prometheus, where, rule["name"], rule["name"], span)
    used = metrics_in(rule["query"]) or {"up"}
    missing = [name for name in used if not prometheus.has(name)]
    found = f"no {', '.join(missing)}" if missing else rule["state"]
    return Row(where, rule["name"], found, "EMPTY" if missing else "ok")


def _exemplars(prometheus: Prometheus, began: float, ended: float) -> Row:
    metric = "vitrine_time_to_first_token_seconds_bucket"
    found = prometheus.get("query_exemplars", {"query": metric, "start": began, "end": ended})
    count = sum(len(series["exemplars"]) for series in found)
    return Row("exemplars", metric, f"{count}", "ok" if count else "EMPTY")


def _over(
    prometheus: Prometheus, where: str, what: str, expr: str, span: tuple[float, float, float]
) -> Row:
    try:
        series = prometheus.over(expr, *span)
    except PrometheusError as error:
        return Row(where, what, str(error), "ERROR")
    found = f"{series.num_series} series, {series.num_points} points"
    return Row(where, what, found, "ok" if series.num_points else "EMPTY")


def verdict(rows: list[Row], console: Console) -> int:
    """Print what was found; the exit status."""
    table = Table()
    for column in ("where", "what", "found", ""):
        table.add_column(column)
    styles = {"ok": "green", "EMPTY": "bold red", "ERROR": "bold red"}
    for row in rows:
        mark = f"[{styles.get(row.verdict, 'yellow')}]{row.verdict}[/]"
        table.add_row(row.where, row.what.replace("[", r"\["), row.found.replace("[", r"\["), mark)
    console.print(table)
    counts = {name: sum(row.verdict == name for row in rows) for name in ("ok", "EMPTY", "ERROR")}
    rest = len(rows) - sum(counts.values())
    console.print(
        f"{len(rows)} looked at: {counts['ok']} ok, {counts['EMPTY']} empty, "
        f"{counts['ERROR']} errors"
        + (f"; {rest} need a GPU, and there is none here" if rest else "")
    )
    return 0 if counts["EMPTY"] == counts["ERROR"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
