"""What the fault scripts share: a server of their own, streams, the books, memory, the verdict."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
from rich.console import Console
from rich.table import Table

START_LIMIT_S = 120.0
STOP_LIMIT_S = 60.0
ENGINE_MODULE = "service.engine"
PAGE_WIDTH = 110  # of tables that go to a file

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test. Times are seconds of `time.monotonic()`."""

    url: str
    process: subprocess.Popen[bytes] | None  # None when it was there before us
    given_engine_pid: int | None
    log: Path | None

    def engine(self) -> psutil.Process | None:
        """The engine process that runs now; None while there is none."""
        if self.given_engine_pid is not None:
            return psutil.Process(self.given_engine_pid)
        if self.process is None:
            return None
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
            engines = [child for child in children if ENGINE_MODULE in child.cmdline()]
        except psutil.Error:  # one ended while we looked
            return None
        return engines[-1] if engines else None

    def rss_bytes(self) -> dict[str, int]:
        """Resident bytes of the API process and of the engine, of those whose pid is known."""
        found: dict[str, int] = {}
        engine = self.engine()
        if engine is not None:
            found["engine"] = engine.memory_info().rss
        if self.process is not None:
            found["api"] = psutil.Process(self.process.pid).memory_info().rss
        return found


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server, the seed, and where the result goes."""
    parser.add_argument("--url", help="of a running server; without it, one is started")
    parser.add_argument("--engine-pid", type=int, help="of the server at --url, to break it")
    parser.add_argument("--seed", type=int, default=None, help="of the script; printed")
    parser.add_argument("--out", type=Path, help="write the result as JSON to this file")
    parser.add_argument("--serve", default="", help="more flags for `vitrine serve`, in one string")


@contextmanager
def target(arguments: argparse.Namespace, *flags: str) -> Iterator[Target]:
    """The server at --url, or a new one with these flags that is ended afterwards."""
    if arguments.url is not None:
        yield Target(arguments.url.rstrip("/"), None, arguments.engine_pid, None)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "service", "serve", "--port", str(port)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VITRINE_")}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, *flags, *arguments.serve.split()],
                stdout=output,
                stderr=output,
                env=environment,
            )
        try:
            _wait_ready(process, url, log)
            yield Target(url, process, None, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{log.read_text(errors='replace')}")
        try:
            with urllib.request.urlopen(url + "/health/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the server was not ready in {START_LIMIT_S:.0f} s")


def http_client() -> httpx2.AsyncClient:
    """A client without limits of its own: as many connections as a script opens."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx2.AsyncClient(
        limits=limits, timeout=httpx2.Timeout(60.0, read=None), trust_env=False
    )


@dataclass(slots=True)
class Stream:
    """What one POST /generate brought."""

    status: int = 0
    texts: list[str] = field(default_factory=list)  # of the token events
    token_ids: list[int] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)  # when each token event came
    last_event: str = ""
    last: Json = field(default_factory=dict)  # data of the last event

    @property
    def finish_reason(self) -> str:
        """Of the `done` event; "error" after an `error` event, "" for a stream cut off."""
        if self.last_event == "error":
            return "error"
        return str(self.last.get("finish_reason", "")) if self.last_event == "done" else ""


async def read_stream(
    client: httpx2.AsyncClient,
    url: str,
    body: Json,
    on_token: Callable[[], None] | None = None,
) -> Stream:
    """POST /generate with one continuation and read its events to the end."""
    stream = Stream()
    async with client.stream("POST", url + "/generate", json=body) as response:
        stream.status = response.status_code
        if stream.status != 200:
            stream.last = json.loads(await response.aread())
            return stream
        rest = b""
        async for chunk in response.aiter_raw():
            now = time.monotonic()
            *events, rest = (rest + chunk).split(b"\n\n")
            for event in events:
                _book(stream, event, now)
            if on_token is not None and stream.last_event == "token":
                on_token()
    return stream


def _book(stream: Stream, event: bytes, now: float) -> None:
    """One event: its `event:` and `data:` lines; a comment has neither."""
    head, found, data = event.partition(b"\ndata: ")
    if not found:
        return
    stream.last_event = head.rpartition(b"event: ")[2].decode()
    stream.last = json.loads(data)
    if stream.last_event == "token":
        stream.texts.append(str(stream.last["text"]))
        stream.token_ids += stream.last["token_ids"]  # type: ignore[operator]
        stream.stamps.append(now)


@dataclass(slots=True)
class Books:
    """Scrapes /metrics without pause and checks law 1 in every scrape:
    accepted = finished + aborted + failed + in flight."""

    url: str
    scrapes: int = 0
    broken: list[str] = field(default_factory=list)  # scrapes that did not add up
    latest: dict[str, float] = field(default_factory=dict)

    async def watch(self, client: httpx2.AsyncClient, every_s: float = 0.02) -> None:
        """Until cancelled."""
        while True:
            await self.scrape(client)
            await asyncio.sleep(every_s)

    async def scrape(self, client: httpx2.AsyncClient) -> None:
        """Once."""
        counts = parse_counts((await client.get(self.url + "/metrics")).text)
        ended = counts["finished"] + counts["aborted"] + counts["failed"]
        self.scrapes += 1
        self.latest = counts
        if counts["accepted"] != ended + counts["in_flight"]:
            self.broken.append(str(counts))


def parse_counts(exposition: str) -> dict[str, float]:
    """accepted, finished, aborted, failed, in_flight and restarts, summed over labels."""
    names = {
        "vitrine_requests_accepted_total": "accepted",
        "vitrine_requests_finished_total": "finished",
        "vitrine_requests_aborted_total": "aborted",
        "vitrine_requests_failed_total": "failed",
        "vitrine_requests_in_flight": "in_flight",
        "vitrine_engine_restarts_total": "restarts",
    }
    counts = dict.fromkeys(names.values(), 0.0)
    for line in exposition.splitlines():
        sample, _, value = line.rpartition(" ")
        name = names.get(sample.partition("{")[0])
        if name is not None:
            counts[name] += float(value)
    return counts


@dataclass(slots=True)
class Report:
    """Figures, and promises kept or broken."""

    name: str
    figures: dict[str, object] = field(default_factory=dict)
    promises: dict[str, bool] = field(default_factory=dict)

    def finish(self, out: Path | None) -> int:
        """Print both, write them as JSON, and return the exit status."""
        console = Console()
        if not console.is_terminal:
            console.width = PAGE_WIDTH
        table = Table(title=f"faults: {self.name}")
        table.add_column("what")
        table.add_column("value", justify="right")
        for what, value in self.figures.items():
            table.add_row(what, f"{value:.3f}" if isinstance(value, float) else str(value))
        for promise, kept in self.promises.items():
            table.add_row(promise, "[green]kept[/]" if kept else "[bold red]broken[/]")
        console.print(table)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            whole = {"name": self.name, "figures": self.figures, "promises": self.promises}
            out.write_text(json.dumps(whole, indent=2) + "\n")
        return 0 if all(self.promises.values()) else 1
