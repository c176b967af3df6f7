"""The paced server as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paced:
    """A running pacer.py."""

    url: str

    def sent(self) -> dict[str, list[int]]:
        """When each event was sent since the last call, in CLOCK_MONOTONIC's ns, by request."""
        moments: dict[str, list[int]] = _get(f"{self.url}/sent")
        return moments


@contextmanager
def paced_server(interval_ms: float) -> Iterator[Paced]:
    """A pacer on a free port, ended afterwards."""
    command = [sys.executable, "-m", "loadtests.load.pacer", "--interval-ms", str(interval_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Paced(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.terminate()


def _get(url: str) -> dict[str, list[int]]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        facts: dict[str, list[int]] = json.loads(answer.read())
        return facts
