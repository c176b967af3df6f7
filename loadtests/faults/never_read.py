"""Clients that never read: they disturb nobody, and are cut off.

Eight streams run throughout. Beside them, one after the other: nobody; --count clients that read;
--count clients that never read, first while their requests are computed and then while the server
waits for them. Promises: the 99th percentile of the eight streams' gaps between tokens stays under
--ratio times what it is beside clients that read (the same batch), and, once nothing is computed
for the others, under --ratio times what it is alone; each that never reads is cut off within the
server's --slow-reader-s and two seconds; nothing of them is held.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Awaitable

import httpx2

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
from loadtests.faults.load import OPENINGS, quantile
from loadtests.faults.raw import Answer, RawClient, allow_files, gaps

READERS = 8
RECEIVE_BYTES = 4096  # of a client that never reads: what it cannot take waits in the server
MIB = 2**20
CUT = "vitrine_slow_readers_total"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_server_arguments(parser)
    parser.add_argument("--count", type=int, default=100, help="clients that never read")
    parser.add_argument("--phase-s", type=float, default=8.0, help="alone, and while they hang")
    parser.add_argument("--tokens", type=int, default=48, help="of theirs, with 20 logprobs each")
    parser.add_argument("--slow-reader-s", type=float, default=10.0, help="the server's")
    parser.add_argument("--ratio", type=float, default=2.0)


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 when a promise was broken."""
    allow_files(2 * arguments.count)
    rng = seeded(arguments)
    flags = ["--slow-reader-s", str(arguments.slow_reader_s)]
    with target(arguments, *flags, "--max-num-seqs", str(READERS + arguments.count)) as server:
        return asyncio.run(_run(arguments, server, rng))


async def _run(arguments: argparse.Namespace, server: Target, rng: random.Random) -> int:
    crowd = [_body(rng, arguments.tokens, logprobs=20) for _ in range(arguments.count)]
    books = Books(server.url)
    readers = Readers(server.url, rng)
    rss = [server.rss_bytes().get("api", 0) / MIB]
    p99: dict[str, float] = {}
    async with http_client() as client:
        before = await held(client, server.url)
        async with running(books.watch(client, every_s=0.1)), running(readers.read()):
            await asyncio.sleep(2)  # until prompts and caches are warm
            p99["alone"] = await readers.p99_during(asyncio.sleep(arguments.phase_s))
            reading = asyncio.gather(*(_read_all(server.url, body) for body in crowd))
            p99["beside those that read"] = await readers.p99_during(reading)
            began = time.monotonic()
            hanging = [
                await RawClient.post(server.url, body, receive_bytes=RECEIVE_BYTES, reads=False)
                for body in crowd
            ]
            p99["beside those that never read"] = await readers.p99_during(
                _until_computed(client, server.url)
            )
            rss.append(server.rss_bytes().get("api", 0) / MIB)
            left_s = began + arguments.slow_reader_s - 1 - time.monotonic()
            p99["while they hang"] = await readers.p99_during(
                asyncio.sleep(max(1.0, min(arguments.phase_s, left_s)))
            )
            computed_at = time.monotonic()
            cut = await _until_cut(client, server.url, arguments)
            cut_s = time.monotonic() - computed_at
        for one in hanging:
            one.close()
        _, after = await until_let_go(client, server.url, before, limit_s=5)
        await books.scrape(client)
    crowded = p99["beside those that never read"] / p99["beside those that read"]
    hung = p99["while they hang"] / p99["alone"]
    report = Report("never-read", arguments.seed)
    report.figures = {
        "clients that never read": arguments.count,
        **{f"p99 gap {name} (ms)": 1e3 * value for name, value in p99.items()},
        "ratio while computed": crowded,
        "ratio while they hang": hung,
        "cut off": int(cut),
        "the last was cut off after (s)": cut_s,
        "API resident before, and with all of them (MiB)": f"{rss[0]:.0f}, {rss[1]:.0f}",
        **{f"{name}, before and after": f"{before[name]:g}, {after[name]:g}" for name in before},
    }
    report.promises = {
        f"p99 stays under {arguments.ratio:g}x while computed": crowded < arguments.ratio,
        f"p99 stays under {arguments.ratio:g}x while they hang": hung < arguments.ratio,
        "all of them were cut off": cut == arguments.count,
        "nothing is held afterwards": all(after[name] <= before[name] for name in before),
        "law 1 held in every scrape": not books.broken,
    }
    return report.finish(arguments.out)


def _body(rng: random.Random, max_tokens: int, **more: object) -> Json:
    body: Json = {"prompt": rng.choice(OPENINGS), "seed": rng.randrange(2**31)}
    return body | {"max_tokens": max_tokens, "ignore_eos": True} | more


class Readers:
    """Streams that run all the time, and the gaps between their tokens."""

    def __init__(self, url: str, rng: random.Random) -> None:
        self._url = url
        self._rng = rng
        self._answers: list[Answer] = []

    async def read(self) -> None:
        """Read one stream after the other, `READERS` at a time, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(READERS):
                group.create_task(self._read_on())

    async def _read_on(self) -> None:
        while True:
            client = await RawClient.post(self._url, _body(self._rng, 400))
            self._answers.append(client.answer)
            try:
                await client.read_all()
            finally:
                client.close()

    async def p99_during(self, work: Awaitable[object]) -> float:
        """The 99th percentile of the gaps in seconds, while `work` is done."""
        began = time.monotonic()
        await work
        return quantile(gaps(self._answers, began), 0.99)


async def _read_all(url: str, body: Json) -> None:
    client = await RawClient.post(url, body)
    try:
        await client.read_all()
    finally:
        client.close()


async def _until_computed(client: httpx2.AsyncClient, url: str) -> None:
    """Until the engine runs the readers' sequences alone."""
    await asyncio.sleep(0.5)
    while (await samples(client, url))["vitrine_journal_entries"] > READERS:  # noqa: ASYNC110
        await asyncio.sleep(0.1)


async def _until_cut(client: httpx2.AsyncClient, url: str, arguments: argparse.Namespace) -> float:
    """Until all were cut off, or they should have been; how many were."""
    deadline = time.monotonic() + arguments.slow_reader_s + 2
    while (cut := (await samples(client, url))[CUT]) < arguments.count:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    return cut
