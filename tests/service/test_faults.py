"""Engines that die, stall and choke under a real server: clients see a pause, or one an error.

Long forms, with figures: `python -m loadtests.faults --help`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.poisoned_engine import POISONED_PROMPT
from tests.servers import Server, running_server, status

THREADS = ("--threads", "1")
OPENINGS = ("Once upon a time", "The little dog", "One day", "There was a big tree")


def bodies(count: int, max_tokens: int = 200) -> list[dict[str, object]]:
    return [
        {
            "prompt": OPENINGS[i % len(OPENINGS)],
            "seed": i,
            "max_tokens": max_tokens,
            "ignore_eos": True,
        }
        for i in range(count)
    ]


def read(server: Server, body: dict[str, object]) -> tuple[str, str, list[int]]:
    """How a stream ended, its text and its token ids; fails when they do not agree."""
    text, token_ids, kind, data = "", [], "", {}
    for kind, data in server.events(body):
        if kind == "token":
            text += str(data["text"])
            token_ids += data["token_ids"]  # type: ignore[operator]
    if kind == "error":
        return "error", text, token_ids
    assert kind == "done", f"a stream was cut off after {kind!r}"
    assert data["text"] == text
    return str(data["finish_reason"]), text, token_ids


def metric(server: Server, name: str) -> float:
    """A sample, or the sum of all samples of a family without its labels."""
    values = [
        float(line.rpartition(" ")[2])
        for line in httpx2.get(f"{server.url}/metrics").text.splitlines()
        if line.startswith((name + " ", name + "{"))
    ]
    assert values, f"/metrics has no {name}"
    return sum(values)


class Books(threading.Thread):
    """Reads /metrics without pause; law 1 must hold in every scrape."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.scrapes = 0
        self.broken: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        with httpx2.Client() as client:
            while not self.stop.is_set():
                exposition = client.get(f"{self.server.url}/metrics").text
                counts = dict.fromkeys(("accepted", "finished", "aborted", "failed"), 0.0)
                for line in exposition.splitlines():
                    for name in counts:
                        if line.startswith(f"vitrine_requests_{name}_total"):
                            counts[name] += float(line.rpartition(" ")[2])
                    if line.startswith("vitrine_requests_in_flight "):
                        in_flight = float(line.rpartition(" ")[2])
                ended = counts["finished"] + counts["aborted"] + counts["failed"]
                self.scrapes += 1
                if counts["accepted"] != ended + in_flight:
                    self.broken.append(f"{counts} and {in_flight} in flight")


@contextmanager
def balanced(server: Server) -> Iterator[Books]:
    """Law 1 holds all the while."""
    books = Books(server)
    books.start()
    try:
        yield books
    finally:
        books.stop.set()
        books.join(20)
    assert books.scrapes > 0
    assert not books.broken, books.broken[0]


@contextmanager
def streaming(
    server: Server, requests: list[dict[str, object]]
) -> Iterator[list[Future[tuple[str, str, list[int]]]]]:
    """All of these at once, each in a thread."""
    with ThreadPoolExecutor(len(requests)) as pool:
        yield [pool.submit(read, server, body) for body in requests]


def wait_for(server: Server, name: str, value: float, limit_s: float = 30.0) -> None:
    """Until the metric has at least this value."""
    deadline = time.monotonic() + limit_s
    while metric(server, name) < value:
        assert time.monotonic() < deadline, f"{name} below {value}:\n{server.log.read_text()}"
        time.sleep(0.02)


RESTARTS = "vitrine_engine_restarts_total"


@pytest.mark.slow
def test_no_token_is_lost_or_doubled_when_engines_are_killed(tmp_path: Path) -> None:
    requests = bodies(8, max_tokens=450)
    rng = random.Random(1)
    with running_server(tmp_path, *THREADS, unhurried=True) as server, balanced(server):
        with streaming(server, requests) as streams:
            for kills in range(3):
                wait_for(server, RESTARTS, kills)
                wait_for(server, 'vitrine_engine_state{state="busy"}', 1)
                time.sleep(rng.uniform(0.0, 0.5))
                server.engine.kill()
            server.hurry()
        with streaming(server, requests) as expected:
            pass
        wait_for(server, RESTARTS, 3)
        assert [s.result() for s in streams] == [e.result() for e in expected]
        assert metric(server, RESTARTS) == 3
        assert metric(server, 'vitrine_engine_restarts_total{cause="exit"}') == 3
        assert metric(server, "vitrine_requests_failed_total") == 0


@pytest.mark.slow
def test_a_stopped_engine_is_replaced_and_readiness_says_so_first(tmp_path: Path) -> None:
    requests = bodies(3, max_tokens=250)
    flags = (*THREADS, "--stall-s", "2")
    with running_server(tmp_path, *flags, unhurried=True) as server, balanced(server):
        with streaming(server, requests) as streams:
            wait_for(server, 'vitrine_engine_state{state="busy"}', 1)
            time.sleep(0.2)
            engine = server.engine
            engine.send_signal(signal.SIGSTOP)
            deadline = time.monotonic() + 15
            details = set()
            while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline, "a stopped engine was not replaced in 15 s"
                answer = httpx2.get(f"{server.url}/health/ready")
                details.add(answer.json().get("detail", ""))
                time.sleep(0.05)
            server.hurry()
        with streaming(server, requests) as expected:
            pass
        assert [s.result() for s in streams] == [e.result() for e in expected]
        assert any("has not been heard for" in detail for detail in details)
        assert metric(server, 'vitrine_engine_restarts_total{cause="stall"}') == 1


@pytest.mark.slow
def test_a_slow_step_is_no_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be replayed for ever: nothing was heard of a step before its end."""
    monkeypatch.setenv("POISON", "slow")
    flags = (*THREADS, "--stall-s", "2")
    with running_server(tmp_path, *flags, module="tests.poisoned_server") as server:
        began = time.monotonic()
        answer = server.generate({"prompt": POISONED_PROMPT, "max_tokens": 1, "ignore_eos": True})
        assert time.monotonic() - began > 3, "the step was not longer than --stall-s"
        assert answer["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
        assert metric(server, RESTARTS) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "num_dead"), [("raise", 0), ("memory", 0), ("abort", 3), ("hang", 3)]
)
def test_one_bad_request_hurts_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, num_dead: int
) -> None:
    """Law 6: the forward raises, or the process dies or hangs with this prompt."""
    monkeypatch.setenv("POISON", fault)
    requests = bodies(4, max_tokens=120)
    poisoned: dict[str, object] = {"prompt": POISONED_PROMPT, "max_tokens": 5}
    flags = (*THREADS, "--stall-s", "2")
    with (
        running_server(tmp_path, *flags, unhurried=True) as server,
        balanced(server),
    ):
        with streaming(server, [*requests, poisoned]) as streams:
            streams[-1].result()
            server.hurry()
        with streaming(server, requests) as expected:
            pass
        *healthy, guilty = [stream.result() for stream in streams]
        assert guilty == ("error", "", [])
        assert healthy == [e.result() for e in expected]
        assert metric(server, RESTARTS) == num_dead
        assert metric(server, "vitrine_requests_failed_total") == 1


def test_a_crash_loop_backs_off_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POISON", "unborn")
    with running_server(tmp_path, module="tests.poisoned_server", ready=False) as server:
        deadline = time.monotonic() + 60
        detail = ""
        while "keeps dying" not in detail:
            assert time.monotonic() < deadline, detail
            if status(f"{server.url}/health/live") == 200:
                detail = httpx2.get(f"{server.url}/health/ready").json()["detail"]
            time.sleep(0.05)
        assert "was killed by SIGABRT" in detail
        assert "/" not in detail
        refused = httpx2.post(f"{server.url}/generate", json={"prompt": "a"})
        assert refused.status_code == 503
        assert metric(server, 'vitrine_engine_state{state="crash-loop"}') == 1
        assert status(f"{server.url}/health/live") == 200
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


def test_the_standby_takes_over_and_ends_with_the_server(tmp_path: Path) -> None:
    with running_server(tmp_path, *THREADS) as server:
        engine, standby = wait_for_engines(server, 2)
        engine.kill()
        wait_for(server, RESTARTS, 1)
        server.wait_ready()
        assert server.engine == standby
        processes = wait_for_engines(server, 2)
        assert server.stop() == 0
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not alive


def test_a_dead_standby_is_not_called_upon(tmp_path: Path) -> None:
    with running_server(tmp_path, *THREADS) as server:
        engine, standby = wait_for_engines(server, 2)
        standby.kill()
        engine.kill()
        wait_for(server, RESTARTS, 1)
        server.wait_ready()
        assert read(server, bodies(1, max_tokens=5)[0])[0] == "length"


def test_a_standby_whose_folder_was_swept_away_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running_server(tmp_path, *THREADS) as server:
        engine, _ = wait_for_engines(server, 2)
        for folder in tmp_path.glob("vitrine-*"):
            shutil.rmtree(folder)
        engine.kill()
        wait_for(server, RESTARTS, 2)
        server.wait_ready()
        assert read(server, bodies(1, max_tokens=5)[0])[0] == "length"


def wait_for_engines(server: Server, count: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 10
    while len(engines := server.engines()) != count:
        assert time.monotonic() < deadline, f"{len(engines)} engine processes after 10 s"
        time.sleep(0.02)
    return engines


@pytest.mark.slow
def test_sigterm_under_load_cuts_nobody_off(tmp_path: Path) -> None:
    short, long = bodies(4, max_tokens=5), bodies(12, max_tokens=480)
    with running_server(tmp_path, *THREADS, "--drain-s", "0.5") as server:
        with streaming(server, short + long) as streams:
            wait_for(server, "vitrine_requests_accepted_total", 16)
            server.process.send_signal(signal.SIGTERM)
        ends = {stream.result()[0] for stream in streams}
        assert ends <= {"length", "cancelled"}
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log.read_text()


def test_a_second_signal_cuts_the_grace_time_short(tmp_path: Path) -> None:
    with running_server(tmp_path, *THREADS, "--drain-s", "60") as server:
        os.kill(server.engine.pid, signal.SIGSTOP)  # so that nothing can finish
        with streaming(server, bodies(3)) as streams:
            wait_for(server, "vitrine_requests_accepted_total", 3)
            server.process.send_signal(signal.SIGTERM)
            while status(f"{server.url}/health/ready") != 503:
                time.sleep(0.02)
            server.process.send_signal(signal.SIGTERM)
        assert {stream.result()[0] for stream in streams} == {"cancelled"}
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_client_that_never_reads_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with running_server(tmp_path, *THREADS, "--drain-s", "0.5") as server:
        port = int(server.url.rpartition(":")[2])
        body = b'{"prompt": "a", "max_tokens": 480, "n": 16, "logprobs": 20, "ignore_eos": true}'
        with socket.create_connection(("127.0.0.1", port)) as never_read:
            never_read.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            never_read.sendall(
                b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            wait_for(server, "vitrine_requests_accepted_total", 1)
            time.sleep(6)  # for its events to fill every buffer on the way
            assert server.stop(limit_s=30) == 0
        assert "Traceback" not in server.log.read_text()
