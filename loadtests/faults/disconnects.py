"""Clients that hang up at random moments: nothing of them stays behind.

--count clients at once; each hangs up before its answer or in the middle of it, but for a few that
stay. Then --burst clients, all in the middle of their streams, hang up at one moment. Promises:
blocks, journal, requests, tasks and sockets are what they were before within --free-s of that
moment, and so they are after the random ones; the books add up.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from contextlib import suppress

from loadtests.faults.common import (
    Books,
    Json,
    Report,
    Target,
    add_server_arguments,
    http_client,
    running,
    seeded,
    target,
)
from loadtests.faults.gauges import held, samples, until_let_go
from loadtests.faults.load import bodies
from loadtests.faults.raw import RawClient, allow_files

DETACH_S = 0.5
STAYING = 0.05  # share of clients that do not hang up
SEVERAL = 0.2  # share of requests with two continuations
LIMIT_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_server_arguments(parser)
    parser.add_argument("--count", type=int, default=500, help="clients")
    parser.add_argument("--tokens", type=int, default=200, help="of the longest stream")
    parser.add_argument("--within-s", type=float, default=8.0, help="the last hangs up after")
    parser.add_argument("--detached", type=float, default=0.1, help="share made with detach_s")
    parser.add_argument("--burst", type=int, default=64, help="clients that leave together")
    parser.add_argument("--free-s", type=float, default=1.0, help="all is free after the burst")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 when a promise was broken."""
    allow_files(arguments.count)
    rng = seeded(arguments)
    room = str(2 * arguments.count)
    with target(arguments, "--max-queue-requests", room, "--max-detachable", room) as server:
        return asyncio.run(_run(arguments, server, rng))


async def _run(arguments: argparse.Namespace, server: Target, rng: random.Random) -> int:
    report = Report("disconnects", arguments.seed)
    books = Books(server.url)
    requests = bodies(rng, arguments.count, arguments.tokens)
    for body in requests:
        body["n"] = 2 if rng.random() < SEVERAL else 1
        if rng.random() < arguments.detached:
            body["detach_s"] = DETACH_S
    patience = [
        LIMIT_S if rng.random() < STAYING else rng.uniform(0, arguments.within_s) for _ in requests
    ]
    async with http_client() as client:
        before = await held(client, server.url)
        async with running(books.watch(client, every_s=0.1)):
            clients = map(_visit, [server.url] * arguments.count, requests, patience)
            stayed = await asyncio.gather(*clients)
        await asyncio.sleep(DETACH_S if arguments.detached else 0.0)
        left_s, _ = await until_let_go(client, server.url, before, LIMIT_S)
        streams = bodies(rng, arguments.burst, 2 * arguments.tokens)
        leaving = await asyncio.gather(*(_begin(server.url, body) for body in streams))
        step_s = _mean_step_s(await samples(client, server.url))
        for one in leaving:
            one.close()
        freed_s, after = await until_let_go(client, server.url, before, LIMIT_S)
        await books.scrape(client)
    counts = books.latest
    report.figures = {
        "clients": arguments.count,
        "read to the end": sum(stayed),
        **{name: int(counts[name]) for name in ("accepted", "finished", "aborted", "failed")},
        "all free after the random ones (s)": left_s,
        "all free after the burst (s)": freed_s,
        "a step before it, mean (s)": step_s,
        **{f"{name}, before and after": f"{before[name]:g}, {after[name]:g}" for name in before},
    }
    report.promises = {
        "all was free after the random ones": left_s < LIMIT_S,
        f"all was free within {arguments.free_s:g} s of the burst": freed_s <= arguments.free_s,
        "some were aborted": counts["aborted"] > 0,
        "none failed": counts["failed"] == 0,
        "law 1 held in every scrape": not books.broken,
    }
    return report.finish(arguments.out)


def _mean_step_s(found: dict[str, float]) -> float:
    """Of all steps so far."""
    phases = ("decode", "prefill", "mixed")
    total_s, count = (
        sum(found[f'vitrine_step_seconds_{what}{{phase="{phase}"}}'] for phase in phases)
        for what in ("sum", "count")
    )
    return total_s / count if count else 0.0


async def _begin(url: str, body: Json) -> RawClient:
    """A client in the middle of its stream."""
    client = await RawClient.post(url, body)
    if await client.read_head() != 200:
        raise RuntimeError(f"a client of the burst was answered {client.answer.status}")
    async for event, _ in client.events():
        if event == "token":
            break
    return client


async def _visit(url: str, body: Json, patience_s: float) -> bool:
    """Ask, and hang up when out of patience; True when the answer was complete before."""
    client = await RawClient.post(url, body)
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await client.read_all()
        return client.answer.finish_reason == "length"
    finally:
        client.close()
