"""Full load for minutes, mixed sizes, some clients gone half-way: memory stays where it was.

Resident memory of both processes, at the end, must be within five percent of its value after
two minutes (after a fifth of a run shorter than ten).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time

import httpx2
from rich.progress import Progress

from loadtests.faults.common import (
    Books,
    Report,
    Target,
    add_server_arguments,
    http_client,
    read_stream,
    running,
    seeded,
    target,
)
from loadtests.faults.load import bodies

SETTLED_S = 120.0
TOLERANCE = 0.05
SAMPLES = 10  # seconds of memory readings whose median counts


class GoneError(Exception):
    """This client has heard enough."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_server_arguments(parser)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=80, help="at once; 64 sequences run")
    parser.add_argument("--max-tokens", type=int, default=200, help="of the longest stream")
    parser.add_argument("--gone", type=float, default=0.2, help="share of clients that go away")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 when a promise was broken."""
    rng = seeded(arguments)
    with target(arguments) as server:
        return asyncio.run(_run(arguments, server, rng))


async def _run(arguments: argparse.Namespace, server: Target, rng: random.Random) -> int:
    books = Books(server.url)
    ended: list[str] = []
    until = time.monotonic() + 60 * arguments.minutes
    async with http_client() as client:
        async with running(books.watch(client, every_s=0.5)):
            clients = asyncio.gather(
                *(
                    _client(
                        arguments, client, server.url, random.Random(rng.random()), ended, until
                    )
                    for _ in range(arguments.clients)
                )
            )
            memory = await _watch_memory(server, until)
            await clients
        await asyncio.sleep(1.0)
        await books.scrape(client)
    settled = min(int(SETTLED_S), len(memory) // 5)
    report = Report("soak", arguments.seed)
    report.figures = {
        "minutes": arguments.minutes,
        **{f"streams that ended with {how}": ended.count(how) for how in sorted(set(ended))},
        "engines replaced, by /metrics": books.latest["restarts"],
        "scrapes": books.scrapes,
    }
    for name in memory[0]:
        begin = statistics.median(one[name] for one in memory[settled : settled + SAMPLES])
        end = statistics.median(one[name] for one in memory[-SAMPLES:])
        report.figures[f"{name}: MiB after {settled} s"] = begin / 2**20
        report.figures[f"{name}: MiB at the end"] = end / 2**20
        report.promises[f"{name}: memory within {TOLERANCE:.0%}"] = (
            abs(end / begin - 1) <= TOLERANCE
        )
    report.notes = books.broken[:5]
    report.promises |= {
        "accepted = finished + aborted + failed + in flight": not books.broken,
        "nothing in flight at the end": books.latest["in_flight"] == 0,
        "no request failed, no engine died": books.latest["failed"] == 0
        and books.latest["restarts"] == 0,
    }
    return report.finish(arguments.out)


async def _client(
    arguments: argparse.Namespace,
    client: httpx2.AsyncClient,
    url: str,
    rng: random.Random,
    ended: list[str],
    until: float,
) -> None:
    """One request after another."""
    while time.monotonic() < until:
        (body,) = bodies(rng, 1, arguments.max_tokens)
        left = rng.randint(1, 50) if rng.random() < arguments.gone else 10**9

        def heard() -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                raise GoneError

        try:
            stream = await read_stream(client, url, body, heard)
            ended.append(stream.finish_reason or f"status {stream.status}")
        except GoneError:
            ended.append("the client gone")


async def _watch_memory(server: Target, until: float) -> list[dict[str, int]]:
    """Resident bytes, once a second."""
    readings: list[dict[str, int]] = []
    total_s = until - time.monotonic()
    with Progress(transient=True) as progress:
        task = progress.add_task("soaking", total=total_s)
        while time.monotonic() < until:
            await asyncio.sleep(1.0)
            readings.append(server.rss_bytes())
            progress.advance(task)
    return readings
