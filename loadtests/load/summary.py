"""What raw samples say: percentiles that are not rounded, integrity, and drift over a long run.

locust ... --samples runs/soak
python -m loadtests.load.summary runs/soak --ttft-ms 500 --tpot-ms 50
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtests.load.samples import Sample, read_samples
from loadtests.load.statistics import Point, Slo, Spread, summarize

QUARTERS = 4


def table_of(columns: Sequence[tuple[str, Point]], title: str) -> Table:
    """A column for each point."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    points = [point for _, point in columns]
    for row in ("requests", "completed", "failed", "refused", "cut"):
        table.add_row(row, *(f"{getattr(point, row):,}" for point in points))
    table.add_row("requests/s", *(f"{point.requests_per_s:,.2f}" for point in points))
    table.add_row("tokens/s", *(f"{point.tokens_per_s:,.0f}" for point in points))
    for name in ("ttft", "itl", "tpot", "e2el", "late"):
        for cut in ("p50", "p90", "p99"):
            cells = (_ms(getattr(point, name), cut) for point in points)
            table.add_row(f"{name.upper()} {cut}, ms", *cells)
    if any(point.slo_share is not None for point in points):
        table.add_row("met the SLO", *(_share(point.slo_share) for point in points))
    return table


def _ms(spread: Spread, cut: str) -> str:
    value = getattr(spread, f"{cut}_s")
    return "-" if value is None else f"{1e3 * value:,.2f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def window(samples: Sequence[Sample]) -> tuple[int, int]:
    """From the first request to the last thing that happened."""
    begin = min(one.due_ns for one in samples)
    end = max(max(one.due_ns, one.end_ns or 0, *one.stamps_ns[-1:]) for one in samples)
    return begin, end + 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.load.summary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ttft-ms", type=float, help="with --tpot-ms: the share that met both")
    parser.add_argument("--tpot-ms", type=float)
    given = parser.parse_args()
    samples = read_samples(given.folder)
    if not samples:
        parser.error(f"{given.folder} has no samples-*.jsonl with anything in it")
    if (given.ttft_ms is None) != (given.tpot_ms is None):
        parser.error("--ttft-ms and --tpot-ms make one SLO: give both")
    slo = None if given.ttft_ms is None else Slo(given.ttft_ms / 1e3, given.tpot_ms / 1e3)
    begin, end = window(samples)
    columns = [("all", summarize(samples, begin, end, slo))]
    quarter = (end - begin) / QUARTERS
    for number in range(QUARTERS):
        edges = (begin + int(number * quarter), begin + int((number + 1) * quarter))
        columns.append((f"quarter {number + 1}", summarize(samples, *edges, slo)))
    console = Console()
    console.print(table_of(columns, f"{given.folder}: {(end - begin) / 1e9:,.1f} s"))
    for failure in columns[0][1].failures:
        console.print(failure, markup=False, highlight=False)
    return 1 if columns[0][1].failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
