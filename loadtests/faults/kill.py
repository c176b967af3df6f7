"""Kill the engine at random moments while streams run: no token is lost or doubled.

Four of five kills come at a random moment after there is an engine again, the fifth at any
moment, be the engine loading or computing prompts. Every stream runs again and again, and is
compared token by token with what it gives undisturbed. /metrics is read all the while and must
add up each time. The time from a kill to the next token is measured from the kill to the end of
the longest silence after it, over all streams.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import time

import psutil
from rich.progress import Progress

from loadtests.faults.common import (
    Books,
    Report,
    Target,
    add_server_arguments,
    http_client,
    running,
    seeded,
    target,
)
from loadtests.faults.load import Comparison, bodies, quantile, repeat, undisturbed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_server_arguments(parser)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--gap-s", type=float, default=3.0, help="between kills, at most")
    parser.add_argument("--max-tokens", type=int, default=400, help="of the longest stream")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 when a promise was broken."""
    rng = seeded(arguments)
    with target(arguments) as server:
        return asyncio.run(_run(arguments, server, rng))


async def _run(arguments: argparse.Namespace, server: Target, rng: random.Random) -> int:
    requests = bodies(rng, arguments.streams, arguments.max_tokens)
    books, comparison = Books(server.url), Comparison()
    async with http_client() as client:
        expected = await undisturbed(client, server.url, requests)
        stop = asyncio.Event()
        async with (
            running(books.watch(client)),
            running(repeat(client, server.url, requests, expected, comparison, stop)) as streams,
        ):
            kills = await _kill(server, rng, books, arguments.kills, arguments.gap_s)
            stop.set()
            await streams
        await books.scrape(client)
    waits = waits_after(kills, comparison.stamps)
    report = Report("kill", arguments.seed)
    report.figures = {
        "kills": len(kills),
        **comparison.figures,
        "outages (kills while tokens flowed)": len(waits),
        "kill to next token, p50 (s)": quantile(waits, 0.5),
        "kill to next token, p99 (s)": quantile(waits, 0.99),
        "engines replaced, by /metrics": books.latest["restarts"],
        "scrapes": books.scrapes,
        "scrapes that did not add up": len(books.broken),
    }
    report.notes = comparison.unfinished[:5] + books.broken[:5]
    report.promises = {
        "no token lost, doubled or changed": comparison.is_clean,
        "accepted = finished + aborted + failed + in flight": not books.broken,
        "nothing in flight at the end": books.latest["in_flight"] == 0,
        "every death was noticed": books.latest["restarts"] >= len(kills),
    }
    return report.finish(arguments.out)


async def _kill(
    server: Target, rng: random.Random, books: Books, count: int, gap_s: float
) -> list[float]:
    """Kill `count` engines; when."""
    kills: list[float] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("killing", total=count)
        while len(kills) < count:
            if kills and rng.random() < 0.8:
                await _engine_again(books, len(kills))
            await asyncio.sleep(rng.uniform(0.05, gap_s))
            engine = server.engine()
            if engine is None:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.kill()
                kills.append(time.monotonic())
                progress.advance(task)
    return kills


async def _engine_again(books: Books, kills: int) -> None:
    """Until the last dead engine has been replaced."""
    while not (books.latest["busy"] and books.latest["restarts"] == kills):  # noqa: ASYNC110
        await asyncio.sleep(0.02)


def waits_after(kills: list[float], stamps: list[float]) -> list[float]:
    """Seconds from each kill to the end of the longest silence before the next one. When that
    silence lasts until the next kill, both kills are one outage."""
    waits = []
    begin = kills[0]
    for kill, until in zip(kills, [*kills[1:], max(stamps)], strict=True):
        times = [kill, *sorted(stamp for stamp in stamps if kill <= stamp < until), until]
        _, end = max((after - before, after) for before, after in itertools.pairwise(times))
        if end < until or until == max(stamps):
            waits.append(end - begin)
            begin = until
    return waits
