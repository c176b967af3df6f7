"""SIGTERM under load: every accepted request finishes or ends as cancelled, and the exit is 0.

New requests keep coming after the signal and must be refused with 503 or find no server; none
may be cut off. The server has --drain-s for what runs and a few seconds for the last bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

import httpx2

from loadtests.faults.common import (
    Report,
    Stream,
    Target,
    add_server_arguments,
    http_client,
    read_stream,
    seeded,
    target,
)
from loadtests.faults.load import bodies

AFTER_DRAIN_S = 10.0
WAIT_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_server_arguments(parser)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--drain-s", type=float, default=3.0, help="the server's grace time")
    parser.add_argument("--max-tokens", type=int, default=450, help="of the longest stream")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 when a promise was broken."""
    if arguments.url is not None:
        raise SystemExit("sigterm ends the server: it starts one of its own")
    rng = seeded(arguments)
    with target(arguments, "--drain-s", str(arguments.drain_s)) as server:
        return asyncio.run(_run(arguments, server, rng))


async def _run(arguments: argparse.Namespace, server: Target, rng: random.Random) -> int:
    if server.process is None or server.log is None:
        raise RuntimeError("the server was not started here")
    requests = bodies(rng, arguments.streams, arguments.max_tokens)
    ended: list[str] = []
    async with http_client() as client:

        async def one(body: dict[str, object]) -> None:
            while server.process is not None and server.process.poll() is None:
                try:
                    ended.append(_how(await read_stream(client, server.url, body)))
                except httpx2.ConnectError:
                    ended.append("no server")
                except httpx2.TransportError as error:
                    ended.append(f"cut off ({type(error).__name__})")
                await asyncio.sleep(0.2)

        streams = asyncio.gather(*(one(body) for body in requests))
        await asyncio.sleep(rng.uniform(1.0, 3.0))
        server.process.terminate()
        told_at = time.monotonic()
        status = await asyncio.to_thread(server.process.wait, WAIT_S)
        took_s = time.monotonic() - told_at
        await streams
    counts = {how: ended.count(how) for how in sorted(set(ended))}
    report = Report("sigterm", arguments.seed)
    report.figures = {**counts, "exit status": status, "SIGTERM to exit (s)": took_s}
    report.promises = {
        "none cut off": set(counts) <= {"length", "cancelled", "refused (503)", "no server"},
        f"ended within {arguments.drain_s + AFTER_DRAIN_S:g} s": took_s
        <= arguments.drain_s + AFTER_DRAIN_S,
        "exit status 0": status == 0,
        "no traceback in the log": "Traceback" not in server.log.read_text(errors="replace"),
    }
    return report.finish(arguments.out)


def _how(stream: Stream) -> str:
    if stream.status != 200:
        return f"refused ({stream.status})"
    return stream.finish_reason or "cut off"
