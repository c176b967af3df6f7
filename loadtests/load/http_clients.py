"""Which HTTP client tells the time honestly under gevent?

    python -m loadtests.load.http_clients --streams 64 --interval-ms 20

Each reads the same paced streams (pacer.py) from greenlets of one process. Late: from the moment
the server sent an event to the moment the greenlet had its line.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import argparse
import http.client
import json
import time
from collections.abc import Callable, Iterator

import gevent
import requests
from rich.console import Console
from rich.table import Table

from loadtests.load.pacing import Paced, paced_server
from loadtests.load.statistics import percentile

Reader = Callable[[str, bytes], Iterator[bytes]]
HEADERS = {"content-type": "application/json"}


def fast_http_readline(url: str, body: bytes) -> Iterator[bytes]:
    """FastHttpUser's client (geventhttpclient), a line at a time."""
    from geventhttpclient.client import HTTPClient

    host, port = url.removeprefix("http://").split(":")
    client = HTTPClient(host, int(port), network_timeout=60.0, concurrency=1)
    stream = client.post("/generate", body, HEADERS)
    while line := stream.readline(b"\n"):
        yield bytes(line)
    client.close()


def fast_http_iter(url: str, body: bytes) -> Iterator[bytes]:
    """The same client, iterated over: blocks of 4 KiB."""
    from geventhttpclient.client import HTTPClient

    host, port = url.removeprefix("http://").split(":")
    client = HTTPClient(host, int(port), network_timeout=60.0, concurrency=1)
    yield from _lines(iter(client.post("/generate", body, HEADERS)))
    client.close()


def requests_iter_lines(url: str, body: bytes) -> Iterator[bytes]:
    """requests as its documentation shows streaming: blocks of 512 bytes."""
    with requests.post(f"{url}/generate", body, headers=HEADERS, stream=True) as response:
        for line in response.iter_lines():
            yield line + b"\n"


def requests_chunks(url: str, body: bytes) -> Iterator[bytes]:
    """requests, chunks as they come."""
    with requests.post(f"{url}/generate", body, headers=HEADERS, stream=True) as response:
        yield from _lines(response.iter_content(chunk_size=None))


def stdlib_read1(url: str, body: bytes) -> Iterator[bytes]:
    """http.client, what is there."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/generate", body, HEADERS)
    response = connection.getresponse()
    yield from _lines(iter(lambda: response.read1(65536), b""))
    connection.close()


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + bytes(block)).split(b"\n")
        for line in lines:
            yield line + b"\n"


READERS: tuple[Reader, ...] = (
    fast_http_readline,
    stdlib_read1,
    requests_chunks,
    requests_iter_lines,
    fast_http_iter,
)


def measure(server: Paced, reader: Reader, streams: int, tokens: int) -> tuple[list[float], float]:
    """Milliseconds that each token came late, and the processor time of one event in us."""
    body = json.dumps({"prompt": [1], "max_tokens": tokens}).encode()
    seen: dict[str, list[int]] = {}

    def one() -> None:
        stamps: list[int] = []
        name, event = "", b""
        for line in reader(server.url, body):
            now = time.monotonic_ns()
            if line.startswith(b"event: "):
                event = line[7:-1]
            elif line.startswith(b"data: ") and event == b"start":
                name = json.loads(line[6:])["id"]
            elif line.startswith(b"data: ") and event == b"token":
                stamps.append(now)
        seen[name] = stamps

    server.sent()
    began = time.process_time()
    gevent.joinall([gevent.spawn(one) for _ in range(streams)], raise_error=True)
    cpu_s = time.process_time() - began
    sent = server.sent()
    late = [
        (got - was) / 1e6
        for name, stamps in seen.items()
        for got, was in zip(stamps, sent[name], strict=True)
    ]
    return late, 1e6 * cpu_s / (streams * (tokens + 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--interval-ms", type=float, default=20.0)
    given = parser.parse_args()
    table = Table(title=f"{given.streams} streams, an event every {given.interval_ms:g} ms each")
    for name in ("client", "late p50, ms", "p99", "worst", "CPU us an event"):
        table.add_column(name, justify="left" if name == "client" else "right")
    with paced_server(given.interval_ms) as server:
        for reader in READERS:
            late, cpu_us = measure(server, reader, given.streams, given.tokens)
            worst = [percentile(late, percent) or 0.0 for percent in (50, 99, 100)]
            table.add_row(reader.__name__, *(f"{value:,.2f}" for value in worst), f"{cpu_us:,.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
