"""A server process on a free loopback port, and the same load for each of them."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtests.peers.machine import wait_until_quiet
from loadtests.peers.streams import Json, Seen, read_all
from loadtests.peers.work import (
    Measurement,
    PeerError,
    Work,
    from_stamps,
    require_tokens,
    warmed,
)

HOST = "127.0.0.1"
START_LIMIT_S = 120.0
STOP_LIMIT_S = 20.0
SETTLE_LIMIT_S = 10.0


@contextmanager
def running(
    command: Callable[[int], list[str]], log: Path, environment: dict[str, str], ready: str
) -> Iterator[str]:
    """Start `command(port)`, wait until `ready` answers 200, yield the URL, end it by its pid."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    url = f"http://{HOST}:{port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command(port), stdout=output, stderr=output, env=environment)
    try:
        _wait_ready(process, url + ready, log)
        # Ours starts a standby engine then: two seconds of a core, once in a server's life.
        wait_until_quiet(SETTLE_LIMIT_S, lambda _: None)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def load(
    work: Work,
    url: str,
    body: Callable[[list[int], int], Json],
    understand: Callable[[Json], Seen],
) -> Iterator[Measurement]:
    """All streams of a batch at once: one brief wave, one measured wave per batch size."""

    def run(prompts: list[list[int]], output_tokens: int) -> Measurement:
        bodies = [body(prompt, output_tokens) for prompt in prompts]
        began, streams = read_all(url, bodies, understand)
        totals = [len(s.stamps) if s.total is None else s.total for s in streams]
        require_tokens(totals, output_tokens)
        return from_stamps(
            work,
            began,
            # Tokens withheld until the end came with its last event.
            [s.stamps + [s.ended] * (output_tokens - len(s.stamps)) for s in streams],
            output_tokens,
            all_visible=all(len(s.stamps) == output_tokens for s in streams),
            first_ids=streams[0].token_ids,
        )

    yield from warmed(work, run)


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise PeerError(f"the server ended: {' '.join(last)}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise PeerError(f"the server was not ready in {START_LIMIT_S:.0f} s")
