"""What explanations cost those who did not ask for them, through a server.

    python -m loadtests.explain_cost_served gaps --streams 1,8 --rounds 5
    python -m loadtests.explain_cost_served streams --plain 24 --explaining 8 --rounds 5

`gaps`: the gaps between a stream's events, with and without clients that ask POST /explain for
`--tokens` tokens again and again, `--seconds` each; the ratio of the 99th percentiles.
`streams`: tokens a second of plain streams beside streams with `explain: true`, and beside as many
plain ones; the ratio. The two sides of a round follow each other, in turns which first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from statistics import median
from urllib.parse import urlsplit

from loadtests.faults.common import add_server_arguments, target
from loadtests.peers.streams import read_all
from loadtests.served import understand

Json = dict[str, object]
LIMIT_S = 300.0
TOKEN_IDS = b'"token_ids":['


@dataclass(slots=True)
class Seen:
    """What came of one stream."""

    num_tokens: int = 0
    stamps: list[float] = field(default_factory=list)  # of its events

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.explain_cost_served",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["gaps", "streams"])
    add_server_arguments(parser)
    parser.add_argument("--model", help="without it, the bundled one")
    parser.add_argument("--threads", type=int, help="of the engine; without it, torch's choice")
    parser.add_argument("--streams", default="1,8", help="gaps: how many run at once")
    parser.add_argument("--clients", type=int, default=2, help="gaps: that ask for explanations")
    parser.add_argument("--tokens", type=int, default=128, help="gaps: of each explanation")
    parser.add_argument("--seconds", type=float, default=20.0, help="gaps: of one side of a round")
    parser.add_argument("--plain", type=int, default=24, help="streams: that are measured")
    parser.add_argument("--explaining", type=int, default=8, help="streams: beside them")
    parser.add_argument("--heads", type=int, default=2, help="streams: explain_heads of those")
    parser.add_argument("--output-len", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    flags = [] if given.model is None else ["--model", given.model]
    flags += [] if given.threads is None else ["--threads", str(given.threads)]
    results: dict[str, list[float]] = {}
    with target(given, *flags) as server:
        if given.what == "gaps":
            for count in map(int, given.streams.split(",")):
                results[f"{count} streams"] = asyncio.run(gap_ratios(server.url, count, given))
        else:
            results["throughput"] = throughput_ratios(server.url, given)
    for name, ratios in results.items():
        print(f"{name}: median ratio {median(ratios):.3f} of {len(ratios)} rounds")
    if given.out is not None:
        given.out.write_text(json.dumps({"what": given.what, "ratios": results}) + "\n")


async def gap_ratios(url: str, count: int, given: argparse.Namespace) -> list[float]:
    """99th percentiles beside explanations over those without, a round each."""
    ratios = []
    bodies = [body(given.output_len) for _ in range(count)]
    await asyncio.gather(*(run_stream(url, one) for one in bodies))  # warm
    for number in range(given.rounds):
        found: dict[bool, list[float]] = {}
        num_explained = 0
        for explaining in (False, True) if number % 2 == 0 else (True, False):
            stop = asyncio.Event()
            num_clients = given.clients if explaining else 0
            clients = [
                asyncio.create_task(explain_on(url, given.tokens, stop)) for _ in range(num_clients)
            ]
            found[explaining] = await gaps_for(url, count, given)
            stop.set()
            num_explained += sum(await asyncio.gather(*clients))
        ratios.append(p99(found[True]) / p99(found[False]))
        print(
            f"{count} streams, round {number + 1}: p50 {median(found[False]) * 1e3:.2f} -> "
            f"{median(found[True]) * 1e3:.2f} ms, p99 {p99(found[False]) * 1e3:.2f} -> "
            f"{p99(found[True]) * 1e3:.2f} ms, ratio {ratios[-1]:.3f}, "
            f"{num_explained} explained, of {len(found[True])} gaps",
            flush=True,
        )
    return ratios


async def gaps_for(url: str, count: int, given: argparse.Namespace) -> list[float]:
    """Gaps of so many streams at once, each followed by the next until the time is over."""
    until = time.perf_counter() + given.seconds

    async def stream_on() -> list[float]:
        gaps = []
        while time.perf_counter() < until:
            gaps += (await run_stream(url, body(given.output_len))).gaps
        return gaps

    found = await asyncio.gather(*(stream_on() for _ in range(count)))
    return [gap for gaps in found for gap in gaps]


def throughput_ratios(url: str, given: argparse.Namespace) -> list[float]:
    """Tokens a second of the plain streams, beside explaining ones over beside plain ones."""
    ratios = []
    heads = [[0, head] for head in range(given.heads)]
    explain: Json = {"explain": True, "explain_heads": heads}
    for number in range(given.rounds + 1):  # the first one warms up
        speeds: dict[bool, float] = {}
        for explaining in (False, True) if number % 2 == 0 else (True, False):
            beside = explain if explaining else {}
            bodies = [body(given.output_len) for _ in range(given.plain)]
            bodies += [body(given.output_len) | beside for _ in range(given.explaining)]
            # The client has the server's own cores, and a client of explanations reads more.
            began, streams = read_all(f"{url}/generate", bodies, understand, look_every_s=0.02)
            plain = streams[: given.plain]
            num_tokens = sum(len(stream.token_ids) for stream in plain)
            if num_tokens != given.plain * given.output_len:
                raise RuntimeError(f"{num_tokens} tokens of {given.plain} x {given.output_len}")
            speeds[explaining] = num_tokens / (max(stream.ended for stream in plain) - began)
        if number == 0:
            continue
        ratios.append(speeds[True] / speeds[False])
        print(
            f"round {number}: {given.plain} streams beside {given.explaining} plain "
            f"{speeds[False]:.0f} tokens/s, beside as many explaining {speeds[True]:.0f}, "
            f"ratio {ratios[-1]:.3f}",
            flush=True,
        )
    return ratios


def body(max_tokens: int) -> Json:
    """A request of full length, of a prompt that is in no cache."""
    prompt = [random.randrange(1, 4000) for _ in range(16)]
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


async def run_stream(url: str, request: Json) -> Seen:
    """One stream. Its JSON is not parsed, only its tokens are counted: the client shares the
    machine with the server, and would be dearer for streams that explain."""
    seen = Seen()
    reader, writer = await post(url + "/generate", request)
    try:
        rest = b""
        while size := int(await reader.readline(), 16):
            chunk = (await reader.readexactly(size + 2))[:-2]
            now = time.perf_counter()
            *events, rest = (rest + chunk).split(b"\n\n")
            for event in events:
                _, found, after = event.partition(TOKEN_IDS)
                if found and b"event: token" in event:
                    seen.num_tokens += after[: after.index(b"]")].count(b",") + 1
                    seen.stamps.append(now)
    finally:
        writer.close()
    return seen


async def explain_on(url: str, num_tokens: int, stop: asyncio.Event) -> int:
    """Ask for one explanation after another; how many were answered before `stop`."""
    num_answered = 0
    while not stop.is_set():
        prompt = [random.randrange(1, 4000) for _ in range(num_tokens)]
        asking = asyncio.create_task(explain_once(url, prompt))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([asking, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if asking.done():
            asking.result()
            num_answered += 1
        else:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
    return num_answered


async def explain_once(url: str, prompt: list[int]) -> None:
    reader, writer = await post(url + "/explain", {"prompt": prompt})
    try:
        await reader.read()
    finally:
        writer.close()


async def post(url: str, request: Json) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send it, and read the head of the answer."""
    parts = urlsplit(url)
    payload = json.dumps(request).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        "Content-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n".encode()
        + payload
    )
    head = await reader.readuntil(b"\r\n\r\n")
    if head.split(b" ")[1] != b"200":
        raise RuntimeError(f"{parts.path} answered {head.decode()}{(await reader.read()).decode()}")
    return reader, writer


if __name__ == "__main__":
    main()
