"""Far more clients at once than may wait: each gets its whole stream, or a refusal at once.

Opens --count connections at the same moment, --waves times. Promises: every answer is 200, 429
or 503; every 200 is a complete stream; every refusal comes within --refusal-s; the books add up;
the API process does not grow from the first wave to the last.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections import Counter

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
from loadtests.faults.gauges import held, until_let_go
from loadtests.faults.load import bodies, quantile
from loadtests.faults.raw import Answer, RawClient, allow_files

MIB = 2**20
REFUSALS = (429, 503)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_server_arguments(parser)
    parser.add_argument("--count", type=int, default=2000, help="connections of a wave")
    parser.add_argument("--waves", type=int, default=2)
    parser.add_argument("--queue", type=int, default=256, help="--max-queue-requests")
    parser.add_argument("--tokens", type=int, default=24, help="of each stream")
    parser.add_argument("--refusal-s", type=float, default=10.0, help="a refusal comes within")
    parser.add_argument("--growth-mib", type=float, default=16.0, help="of the API, at most")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 when a promise was broken."""
    allow_files(arguments.count)
    rng = seeded(arguments)
    with target(arguments, "--max-queue-requests", str(arguments.queue)) as server:
        return asyncio.run(_run(arguments, server, rng))


async def _run(arguments: argparse.Namespace, server: Target, rng: random.Random) -> int:
    report = Report("connections", arguments.seed)
    report.figures["connections at once"] = arguments.count
    books = Books(server.url)
    rss: list[float] = []
    answers: list[Answer] = []
    async with http_client() as client:
        before = await held(client, server.url)
        async with running(books.watch(client, every_s=0.1)):
            for _ in range(arguments.waves):
                wave = bodies(rng, arguments.count, arguments.tokens)
                answers += await asyncio.gather(*(_ask(server.url, body) for body in wave))
                rss.append(server.rss_bytes().get("api", 0) / MIB)
        _, after = await until_let_go(client, server.url, before, limit_s=5)
        await books.scrape(client)
    _book(report, arguments, answers)
    report.figures["API resident MiB after each wave"] = ", ".join(f"{one:.1f}" for one in rss)
    report.figures["held after"] = str({k: int(v) for k, v in after.items()})
    report.promises |= {
        "law 1 held in every scrape": not books.broken,
        "nothing is held afterwards": all(after[name] <= before[name] for name in before),
        f"the API grew less than {arguments.growth_mib:g} MiB": (
            rss[-1] - rss[0] < arguments.growth_mib
        ),
    }
    return report.finish(arguments.out)


async def _ask(url: str, body: dict[str, object]) -> Answer:
    try:
        client = await RawClient.post(url, body)
    except OSError:
        return Answer()
    try:
        return await client.read_all()
    finally:
        client.close()


def _book(report: Report, arguments: argparse.Namespace, answers: list[Answer]) -> None:
    statuses = Counter(answer.status for answer in answers)
    complete = [one for one in answers if one.finish_reason == "length"]
    refusals = [one.answered_s - one.sent_s for one in answers if one.status in REFUSALS]
    report.figures |= {f"status {status}": count for status, count in sorted(statuses.items())}
    report.figures |= {
        "complete streams": len(complete),
        "refusal after, median s": quantile(refusals, 0.5),
        "refusal after, at most s": quantile(refusals, 1.0),
    }
    report.promises |= {
        "every answer is 200, 429 or 503": set(statuses) <= {200, *REFUSALS},
        "every 200 is a complete stream": len(complete) == statuses[200],
        "some were served": len(complete) > 0,
        f"every refusal came within {arguments.refusal_s:g} s": (
            max(refusals, default=0.0) <= arguments.refusal_s
        ),
    }
