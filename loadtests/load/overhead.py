"""Is the client the bottleneck? Locust's users against a server that computes nothing.

    python -m loadtests.load.overhead --streams 1,16,64,256 --interval-ms 20

The server (pacer.py) writes down when it sends each event, the users when they have read and
checked it; the difference is what the client adds to every latency it reports. Closed loop.

"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from loadtests.load.pacing import paced_server
from loadtests.load.run import Plan, run
from loadtests.load.statistics import percentile, spread

BUSY_CORES = 0.8  # of one core a process: beyond, events wait for the client


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.load.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--streams", default="1,16,64,256", help="at the same time")
    parser.add_argument("--interval-ms", type=float, default=20.0, help="of a stream's events")
    parser.add_argument("--seconds", type=int, default=8, help="of each measurement")
    parser.add_argument("--processes", type=int, default=1, help="of the client")
    given = parser.parse_args()
    table = Table(title=f"an event every {given.interval_ms:g} ms in each stream")
    for name in ("streams", "events/s", "read late p50, ms", "p99", "worst", "client cores"):
        table.add_column(name, justify="right")
    was_busy = False
    for streams in (int(word) for word in given.streams.split(",")):
        output_len = max(10, int(given.seconds * 1e3 / given.interval_ms / 3))
        plan = Plan(given.seconds, users=streams, output_len=output_len, processes=given.processes)
        with paced_server(given.interval_ms) as server:
            ran = run(server.url, plan)
            sent = server.sent()
        late = [
            (got - was) / 1e9
            for one in ran.samples
            for got, was in zip(one.stamps_ns, sent.get(one.id, ()), strict=False)
        ]
        figures, worst = spread(late), percentile(late, 100) or 0.0
        point = ran.point()
        table.add_row(
            f"{streams}",
            f"{point.tokens_per_s:,.0f}",
            *(f"{1e3 * (value or 0):.2f}" for value in (figures.p50_s, figures.p99_s, worst)),
            f"{ran.client_cores:.2f}",
        )
        was_busy |= ran.client_cores > BUSY_CORES * given.processes
    console = Console(width=100)
    console.print(table)
    if was_busy:
        console.print(f"over {BUSY_CORES:g} of a core for each process: use more --processes")
    return 1 if was_busy else 0


if __name__ == "__main__":
    raise SystemExit(main())
