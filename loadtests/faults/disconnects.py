"""Clients that hang up at random moments: nothing of them stays behind.

--count clients, all at once; each leaves before its answer, in the middle of it or, rarely, stays.
Promises: blocks, journal, tasks and sockets are what they were before within --free-s of the last
one, and the books add up.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

from loadtests.faults.common import Books, Report, Target, add_server_arguments, http_client, target
from loadtests.faults.gauges import held, samples, until_let_go
from loadtests.faults.raw import RawClient, allow_files

DETACH_S = 0.5
STAYS = 0.05  # share of clients that do not hang up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    parser.add_argument("--count", type=int, default=500, help="clients")
    parser.add_argument("--tokens", type=int, default=120, help="of each stream, if read to its end")
    parser.add_argument("--within-s", type=float, default=8.0, help="the last hangs up after")
    parser.add_argument("--detached", type=float, default=0.1, help="share made with detach_s")
    parser.add_argument("--free-s", type=float, default=1.0, help="all is free after the last")


def run(arguments: argparse.Namespace) -> int:
    allow_files(arguments.count)
    flags = ["--max-queue-requests", str(arguments.count), "--max-detachable", "4096"]
    with target(arguments, *flags) as server:
        return asyncio.run(_run(arguments, server))


async def _run(arguments: argparse.Namespace, server: Target) -> int:
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    report = Report("disconnects", {"seed": seed, "clients": arguments.count})
    books = Books(server.url)
    async with http_client() as client:
        before = await held(client, server.url)
        watching = asyncio.create_task(books.watch(client, every_s=0.1))
        dice = random.Random(seed)
        clients = [_leave(server.url, arguments, dice.random) for _ in range(arguments.count)]
        stayed = sum(await asyncio.gather(*clients))
        watching.cancel()
        if arguments.detached:
            await asyncio.sleep(DETACH_S)
        last = (await samples(client, server.url))["vitrine_engine_last_step_seconds"]
        freed_s, after = await until_let_go(client, server.url, before, limit_s=20)
        await books.scrape(client)
    report.figures |= {
        "read to the end": stayed,
        "accepted": int(books.latest["accepted"]),
        "aborted": int(books.latest["aborted"]),
        "all free after, s": freed_s,
        "the engine's last step, s": last,
    }
    report.figures |= {f"{name}, before and after": f"{before[name]:g}, {after[name]:g}" for name in before}
    report.promises |= {
        f"all was free within {arguments.free_s:g} s": freed_s <= arguments.free_s,
        "some were aborted": books.latest["aborted"] > 0,
        "law 1 held in every scrape": not books.broken,
        "none failed": books.latest["failed"] == 0,
    }
    return report.finish(arguments.out)


async def _leave(url: str, arguments: argparse.Namespace, draw: object) -> bool:
    """Ask, and hang up at some moment; True when it read to the end instead."""
    roll = draw  # type: ignore[assignment]
    await asyncio.sleep(0)
    hang_up_at = time.monotonic() + roll() * arguments.within_s  # type: ignore[operator]
    body: dict[str, object] = {
        "prompt": "Once upon a time",
        "max_tokens": arguments.tokens,
        "ignore_eos": True,
        "n": 1 if roll() < 0.8 else 2,  # type: ignore[operator]
    }
    if roll() < arguments.detached:  # type: ignore[operator]
        body["detach_s"] = DETACH_S
    stays = roll() < STAYS  # type: ignore[operator]
    client = await RawClient.post(url, body)
    try:
        if stays:
            return (await client.read_all()).finish_reason == "length"
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + hang_up_at - time.monotonic()):
                await client.read_all()
        except TimeoutError:
            pass
        return False
    finally:
        client.close()
