"""One prompt that the engine cannot compute, among many: only that request fails.

With --fault raise or memory the forward raises, and no engine may be replaced; with abort, exit
or hang the process dies or stalls with the request, three times at most. Runs from a checkout:
the engine with the fault is `tests/poisoned_engine.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import random

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
from loadtests.faults.load import Comparison, bodies, repeat, undisturbed

POISONED_PROMPT = [7, 7, 7, 7]
MAX_REPLACED = {"raise": 0, "memory": 0, "abort": 3, "exit": 3, "hang": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_server_arguments(parser)
    parser.add_argument("--fault", choices=MAX_REPLACED, default="abort")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=300, help="of the longest stream")
    parser.add_argument("--stall-s", type=float, default=5.0, help="the server's limit")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 when a promise was broken."""
    if arguments.url is not None:
        raise SystemExit("poison starts a server of its own: its engine has the fault")
    rng = seeded(arguments)
    with target(
        arguments,
        "--stall-s",
        str(arguments.stall_s),
        module="tests.poisoned_server",
        environment={"POISON": arguments.fault},
    ) as server:
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
            await asyncio.sleep(rng.uniform(0.2, 1.0))
            poisoned = await read_stream(client, server.url, {"prompt": POISONED_PROMPT, "seed": 1})
            stop.set()
            await streams
        await books.scrape(client)
    report = Report("poison", arguments.seed)
    report.figures = {
        "fault": arguments.fault,
        **comparison.figures,
        "the poisoned request ended with": poisoned.finish_reason or "nothing",
        "engines replaced, by /metrics": books.latest["restarts"],
        "requests failed, by /metrics": books.latest["failed"],
    }
    report.notes = comparison.unfinished[:5] + books.broken[:5]
    report.promises = {
        "the poisoned request failed": poisoned.finish_reason == "error",
        "only that one": books.latest["failed"] == 1,
        f"{MAX_REPLACED[arguments.fault]} engines died at most": books.latest["restarts"]
        <= MAX_REPLACED[arguments.fault],
        "no token lost, doubled or changed": comparison.is_clean,
        "accepted = finished + aborted + failed + in flight": not books.broken,
    }
    return report.finish(arguments.out)
