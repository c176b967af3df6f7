"""Real server processes for tests: `vitrine serve` on a free port, ended by its pid."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

START_LIMIT_S = 60.0
ENGINE_MODULES = {"service.engine", "tests.poisoned_engine"}


@dataclass
class Server:
    """A running `vitrine serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    started_at: float
    linger_file: Path

    def linger(self) -> None:
        """The engines of a server started `unhurried` take 10 ms longer for each step, until
        `hurry`: what a test does to a stream is then done in its middle, on every machine."""
        self.linger_file.touch()

    def hurry(self) -> None:
        self.linger_file.unlink()

    @property
    def engine(self) -> psutil.Process:
        """The engine process under it; the standby is always younger."""
        return self.engines()[0]

    def engines(self) -> list[psutil.Process]:
        """The engine process, and the standby if there is one already."""
        engines = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):  # it ended while we looked
                if ENGINE_MODULES & set(child.cmdline()):
                    engines.append((child.create_time(), child.pid, child))
        assert engines, "no engine process"
        return [child for _, _, child in sorted(engines)]

    def wait_ready(self) -> None:
        """Until /health/ready answers 200; fails with the log when the server ends."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended:\n{self.log.read_text()}")
            if status(f"{self.url}/health/ready") == 200:
                return
            time.sleep(0.02)
        raise AssertionError(f"not ready in {START_LIMIT_S} s:\n{self.log.read_text()}")

    def events(self, body: dict[str, object]) -> Iterator[tuple[str, dict[str, object]]]:
        """POST /generate and read the stream: (event, data) as they come."""
        with httpx2.stream("POST", f"{self.url}/generate", json=body, timeout=60) as response:
            assert response.status_code == 200, response.read()
            event = ""
            for line in response.iter_lines():
                if line.startswith("event: "):
                    event = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield event, json.loads(line.removeprefix("data: "))

    def generate(self, body: dict[str, object]) -> dict[str, object]:
        """POST /generate with stream false."""
        response = httpx2.post(f"{self.url}/generate", json=body | {"stream": False}, timeout=60)
        assert response.status_code == 200, response.text
        answer: dict[str, object] = response.json()
        return answer

    def stop(self, sig: int = signal.SIGTERM, limit_s: float = 20) -> int:
        """Send a signal and wait for the exit status."""
        self.process.send_signal(sig)
        return self.process.wait(limit_s)


def status(url: str) -> int | None:
    """Status code of a GET, None when nobody answers."""
    try:
        return httpx2.get(url, timeout=5).status_code
    except httpx2.TransportError:
        return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_server(
    folder: Path,
    *flags: str,
    ready: bool = True,
    module: str = "service",
    unhurried: bool = False,
) -> Iterator[Server]:
    """Start a server with these flags; whatever is left of it in the end is killed.

    `unhurried`: it lingers from the first step on, its `module` being tests.poisoned_server.
    """
    if unhurried:
        module = "tests.poisoned_server"
    port = free_port()
    log = folder / f"server-{port}.log"
    command = [sys.executable, "-m", module, "serve", "--port", str(port), *flags]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VITRINE_")}
    linger_file = folder / f"linger-{port}"
    if unhurried:
        environment["LINGER"] = str(linger_file)
        linger_file.touch()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    server = Server(process, f"http://127.0.0.1:{port}", log, time.monotonic(), linger_file)
    family = psutil.Process(process.pid)
    try:
        if ready:
            server.wait_ready()
        yield server
    finally:
        left = [family, *family.children(recursive=True)] if family.is_running() else []
        for member in left:
            member.kill()
        process.wait(10)
