"""Locust itself against real servers: what it reports, what it checks, and how runs end."""

from __future__ import annotations

import csv
import json
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from statistics import median

import httpx2
import pytest

from loadtests.load.pacing import paced_server
from loadtests.load.run import LOCUSTFILE, Plan, run
from service.bench.workload import pauses
from tests.servers import Server, running_server
from tests.service.chat_model import make_chat_model


def locust(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *flags, "--headless"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def generated(server: Server) -> float:
    """Tokens that the server says it generated for clients."""
    for line in httpx2.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith("vitrine_generated_tokens_total "):
            return float(line.split()[1])
    raise AssertionError("no such counter")


def test_every_figure_is_a_row_of_locusts(server: Server, tmp_path: Path) -> None:
    done = locust(
        *("GenerateUser", "--host", server.url, "-u", "4", "-t", "3s", "--output-len", "16"),
        *("--csv", str(tmp_path / "load"), "--samples", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "load_stats.csv").open() as file:
        rows = {row["Type"]: row for row in csv.DictReader(file)}
    for kind in ("POST", "TTFT", "ITL", "TPOT", "tok/s"):
        assert rows[kind]["Name"] == "/generate"
        assert int(rows[kind]["Request Count"]) > 0
        assert rows[kind]["Failure Count"] == "0"
    assert float(rows["TTFT"]["Median Response Time"]) <= float(
        rows["POST"]["Median Response Time"]
    )


def test_a_user_thinks_as_long_as_its_fellow_in_the_bench(server: Server) -> None:
    ran = run(server.url, Plan(3, users=1, output_len=4, think_s=0.3, seed=5))
    samples = sorted(ran.samples, key=lambda one: one.due_ns)
    thought = [(b.due_ns - (a.end_ns or 0)) / 1e9 for a, b in pairwise(samples)]
    expected = pauses(5, 0, 0.3)
    next(expected)  # before the first request
    assert len(thought) > 3
    late = [found - wanted for found, wanted in zip(thought, expected, strict=False)]
    assert min(late) > -0.005, "nobody thinks shorter"
    assert median(late) < 0.05, "and longer only where the machine has no time"


@pytest.mark.parametrize("workload", ["mixed", "shared", "chat"])
def test_an_open_loop_sends_what_is_due_and_every_stream_is_right(
    server: Server, workload: str
) -> None:
    plan = Plan(
        3, rate=8, workload=workload, prompt_len=12, output_len=8, shared_len=64, drain_s=20
    )
    ran = run(server.url, plan)
    point = ran.point()
    assert point.failures == ()
    assert point.completed == point.requests > 0
    # 24 arrivals are expected; ten is 2.9 standard deviations away.
    assert 10 <= len(ran.samples) <= 45
    dues = [one.due_ns for one in ran.samples]
    assert len(set(dues)) == len(dues)
    if workload != "mixed":
        assert any(one.cached_prompt_tokens for one in ran.samples)


@pytest.mark.slow
def test_tokens_received_are_those_the_server_counted(server: Server) -> None:
    before = generated(server)
    ran = run(server.url, Plan(2, rate=10, output_len=12, drain_s=20))
    assert all(one.finish_reason == "length" for one in ran.samples)
    assert sum(one.num_tokens for one in ran.samples) == generated(server) - before


@pytest.mark.slow
def test_two_processes_share_the_rate(server: Server) -> None:
    ran = run(server.url, Plan(4, rate=10, output_len=4, processes=2, drain_s=20))
    assert ran.point().failures == ()
    assert 18 <= len(ran.samples) <= 70


def test_a_model_without_a_chat_template_is_one_failure_in_words(server: Server) -> None:
    done = locust("ChatUser", "--host", server.url, "-u", "1", "-t", "2s")
    assert done.returncode == 1
    assert "has no chat template" in done.stdout + done.stderr


@pytest.mark.slow
def test_chats_are_right_and_find_their_own_past_in_the_cache(tmp_path: Path) -> None:
    model = str(make_chat_model(tmp_path))
    with running_server(tmp_path, "--model", model, "--threads", "1") as server:
        plan = Plan(3, users=2, user="ChatUser", workload="chat", prompt_len=20, output_len=12)
        ran = run(server.url, plan)
    whole = [one for one in ran.samples if not one.was_cut]
    assert len(whole) > 4
    assert {one.failure for one in whole} == {""}
    assert any(one.cached_prompt_tokens for one in whole)
    assert all(sum(one.counts) == one.num_tokens <= 12 for one in whole)


def test_the_client_reads_events_when_they_come() -> None:
    with paced_server(50.0) as server:
        ran = run(server.url, Plan(2, users=2, output_len=12))
        sent = server.sent()
    late_ms = sorted(
        (got - was) / 1e6
        for one in ran.samples
        for got, was in zip(one.stamps_ns, sent.get(one.id, ()), strict=False)
    )
    # Blocks of 4 KiB, as an iteration over the response reads, hold some 40 of these events: two
    # seconds. A crowded machine is late now and then, not always.
    assert len(late_ms) > 20
    assert late_ms[len(late_ms) // 2] < 50


class Liar(BaseHTTPRequestHandler):
    """Answers with a stream whose text is not what it says it was, or breaks off."""

    breaks_off = False

    def do_GET(self) -> None:
        self._send(b'{"vocab_size": 10, "context_length": 100}', "application/json")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        prompt = {"id": "r", "prompt_tokens": 4, "seed": 1}
        usage = {"prompt_tokens": 4, "cached_prompt_tokens": 0, "completion_tokens": 1}
        done = {"index": 0, "finish_reason": "length", "usage": usage, "timing": {}}
        events = [
            ("start", prompt),
            ("token", {"index": 0, "text": "a", "token_ids": [1]}),
            ("done", done | {"text": "b"}),
        ]
        text = "".join(
            f"id: r:{number}\nevent: {name}\ndata: {json.dumps(data)}\n\n"
            for number, (name, data) in enumerate(events)
        )
        self._send(text.encode(), "text/event-stream", 100 if self.breaks_off else 0)

    def _send(self, body: bytes, kind: str, missing: int = 0) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body if not missing else body[:-missing])

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@contextmanager
def serving(handler: type[socketserver.BaseRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class BreaksOff(Liar):
    breaks_off = True


@pytest.mark.parametrize(
    ("handler", "failure"),
    [(Liar, "are not done.text"), (BreaksOff, "the stream ended without done or error")],
)
def test_a_server_that_breaks_a_promise_is_caught(handler: type[Liar], failure: str) -> None:
    with serving(handler) as url:
        ran = run(url, Plan(1, rate=10, prompt_len=4, output_len=1, drain_s=5))
    assert ran.samples
    assert all(failure in one.failure for one in ran.samples)
    assert ran.point().completed == 0
