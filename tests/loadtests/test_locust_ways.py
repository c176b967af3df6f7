"""Locust in its three ways (web UI, headless, master and workers) and every pattern of load."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from loadtests.load.run import LOCUSTFILE
from loadtests.load.samples import Sample, read_samples
from tests.servers import Server

pytestmark = pytest.mark.slow
SHORT = ("--prompt-len", "8", "--output-len", "4")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def locust(server: Server, *flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "GenerateUser"]
    with subprocess.Popen(
        [*command, "--host", server.url, *SHORT, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def eventually(ask: Any, limit_s: float = 60) -> Any:
    """What `ask` gives as soon as it gives something."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            if found := ask():
                return found
        except httpx2.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError("nothing came")


def test_the_web_ui_starts_a_run_with_our_options_and_shows_our_rows(
    server: Server, tmp_path: Path
) -> None:
    port = free_port()
    flags = ("--web-port", str(port), "--web-host", "127.0.0.1", "--samples", str(tmp_path))
    with locust(server, *flags) as process, httpx2.Client(trust_env=False) as client:
        url = f"http://127.0.0.1:{port}"
        page = eventually(lambda: client.get(url).text)
        assert "burst_every_s" in page
        assert "think_s" in page
        form = {"user_count": "3", "spawn_rate": "10", "host": server.url, "output_len": "5"}
        answer = client.post(f"{url}/swarm", data=form).json()
        assert answer["success"], answer

        def rows() -> dict[str, Any] | None:
            stats = client.get(f"{url}/stats/requests").json()["stats"]
            found = {row["method"]: row for row in stats if row["name"] == "/generate"}
            return found if {"POST", "TTFT", "ITL", "TPOT"} <= set(found) else None

        found = eventually(rows)
        assert all(found[kind]["num_failures"] == 0 for kind in found)
        connects = [
            row
            for row in client.get(f"{url}/stats/requests").json()["stats"]
            if row["method"] == "CONNECT"
        ]
        assert [row["num_requests"] for row in connects] == [3], "each user kept its connection"
        client.post(f"{url}/stop")
        eventually(lambda: client.get(f"{url}/stats/requests").json()["state"] == "stopped")
        assert process.poll() is None
    samples = read_samples(tmp_path)
    assert {one.num_tokens for one in samples if not one.was_cut} == {5}, "the form's own length"


def test_workers_of_a_master_share_the_users(server: Server, tmp_path: Path) -> None:
    port = str(free_port())
    shared = ("--samples", str(tmp_path), "--loglevel", "WARNING")
    master = ("--master", "--expect-workers", "2", "--headless", "-u", "4", "-t", "4s")
    with (
        locust(server, *master, "--master-bind-port", port, *shared) as first,
        locust(server, "--worker", "--master-port", port, *shared) as one,
        locust(server, "--worker", "--master-port", port, *shared) as other,
    ):
        said, _ = first.communicate(timeout=60)
        assert first.returncode == 0, said
        assert one.wait(timeout=30) == other.wait(timeout=30) == 0
    assert "TTFT" in said
    assert "ITL" in said
    assert len(list(tmp_path.glob("samples-*.jsonl"))) == 2, "both workers sent requests"
    assert not any(sample.failure for sample in read_samples(tmp_path))


def most_at_once(samples: list[Sample], begin_s: float, end_s: float) -> int:
    """The most requests in flight at any request's start between these times of the run."""
    first = samples[0].due_ns
    times = [one.due_ns for one in samples if begin_s <= (one.due_ns - first) / 1e9 < end_s]
    return max(
        sum(one.due_ns <= now <= (one.end_ns or one.due_ns) for one in samples) for now in times
    )


BURST = "--pattern burst --burst-users 5 --burst-s 2 --burst-every-s 4"


@pytest.mark.parametrize(
    ("flags", "least", "most"),
    [
        ("--pattern steps --step-users 1,6 --step-s 2", 1, 6),
        (f"-u 1 -t 4 {BURST}", 1, 6),
        ("-u 3 -t 4 --pattern soak", 3, 3),
        ("-t 4 --pattern poisson --rate 10 --stop-timeout 20", 1, 60),
    ],
)
def test_every_pattern_through_locust_itself(
    server: Server, tmp_path: Path, flags: str, least: int, most: int
) -> None:
    with locust(server, "--headless", "--samples", str(tmp_path), *flags.split()) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    samples = read_samples(tmp_path)
    assert len(samples) > 5
    assert not any(sample.failure for sample in samples)
    if "poisson" in flags:
        return
    # Locust looks at a shape once a second; half a second more is a slow machine's.
    assert most_at_once(samples, 0, 1.0) <= least
    assert least < most_at_once(samples, 2.0, 4.0) <= most or least == most
