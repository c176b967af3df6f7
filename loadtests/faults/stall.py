"""Stop the engine (SIGSTOP) while streams run: it is replaced, and nothing is lost.

Readiness must turn 503 while it is silent, and another engine must be there within --stall-s
and five seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import time

import httpx2
import psutil

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
from loadtests.faults.load import Comparison, bodies, repeat, undisturbed

GRACE_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_server_arguments(parser)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=400, help="of the longest stream")
    parser.add_argument("--stall-s", type=float, default=5.0, help="the server's limit")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 when a promise was broken."""
    rng = seeded(arguments)
    with target(arguments, "--stall-s", str(arguments.stall_s)) as server:
        return asyncio.run(_run(arguments, server, rng))


async def _run(arguments: argparse.Namespace, server: Target, rng: random.Random) -> int:
    requests = bodies(rng, arguments.streams, arguments.max_tokens)
    books, comparison = Books(server.url), Comparison()
    limit_s = arguments.stall_s + GRACE_S
    async with http_client() as client:
        expected = await undisturbed(client, server.url, requests)
        stop = asyncio.Event()
        async with (
            running(books.watch(client)),
            running(repeat(client, server.url, requests, expected, comparison, stop)) as streams,
        ):
            await asyncio.sleep(rng.uniform(0.2, 1.0))
            engine = server.engine()
            if engine is None:
                raise SystemExit("there is no engine to stop")
            engine.send_signal(signal.SIGSTOP)
            stopped_at = time.monotonic()
            reasons = await _until_replaced(client, server.url, engine, stopped_at + 4 * limit_s)
            replaced_s = time.monotonic() - stopped_at
            stop.set()
            await streams
        await books.scrape(client)
    next_token_s = min((s for s in comparison.stamps if s > stopped_at + 1), default=0.0)
    report = Report("stall", arguments.seed)
    report.figures = {
        **comparison.figures,
        "stopped to ready again (s)": replaced_s,
        "stopped to next token (s)": next_token_s - stopped_at,
        "engines replaced, by /metrics": books.latest["restarts"],
        "readiness said": "; ".join(sorted(reasons)),
    }
    report.notes = comparison.unfinished[:5] + books.broken[:5]
    report.promises = {
        f"replaced within {limit_s:g} s": replaced_s <= limit_s,
        "readiness was 503 meanwhile": bool(reasons),
        "the stopped process is gone": not engine.is_running(),
        "no token lost, doubled or changed": comparison.is_clean,
        "accepted = finished + aborted + failed + in flight": not books.broken,
    }
    return report.finish(arguments.out)


async def _until_replaced(
    client: httpx2.AsyncClient, url: str, engine: psutil.Process, deadline: float
) -> set[str]:
    """Wait until the process is gone and the server ready; why it was not, without numbers."""
    reasons: set[str] = set()
    while time.monotonic() < deadline:
        response = await client.get(url + "/health/ready")
        if response.status_code == 503:
            detail = str(response.json()["detail"])
            reasons.add("".join("#" if char.isdigit() else char for char in detail))
        elif reasons and not engine.is_running():
            break
        await asyncio.sleep(0.05)
    return reasons
