"""A real server, from its start to its end: two processes, signals, and who outlives whom."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.servers import Server, running_server, status

STORY = {"prompt": "Once upon a time", "seed": 1, "max_tokens": 60, "ignore_eos": True}


def test_a_story_streams(server: Server) -> None:
    # Whoever else computes on this machine can only join events, never part them, so one story
    # that comes token by token is enough; a server that collects them tells none so.
    give_up_at = time.monotonic() + 30
    num_events = 0
    while num_events <= 20:
        assert time.monotonic() < give_up_at, "tokens came in a few lumps instead of one by one"
        events = list(server.events(STORY))
        kinds = [kind for kind, _ in events]
        num_events = len(kinds)
        assert kinds[0] == "start"
        assert kinds[-1] == "done"
        assert set(kinds[1:-1]) == {"token"}
        done = events[-1][1]
        told = "".join(str(data["text"]) for kind, data in events if kind == "token")
        assert told == done["text"]
        assert done["finish_reason"] == "length"
        assert done["usage"]["completion_tokens"] == 60  # type: ignore[index]


def test_streamed_and_whole_answers_are_the_same_text(server: Server) -> None:
    streamed = list(server.events(STORY))[-1][1]["text"]
    choices = server.generate(STORY)["choices"]
    assert choices[0]["text"] == streamed  # type: ignore[index]


def test_the_api_answers_long_before_the_model_is_loaded(tmp_path: Path) -> None:
    """It must not wait for torch: /health/live first, /health/ready when there is an engine."""
    with running_server(tmp_path, ready=False) as server:
        api = psutil.Process(server.process.pid)
        # Before it is our module it is a part of starting it, which the API waits for.
        while not (engines := [one for one in api.children() if "service.engine" in one.cmdline()]):
            assert server.process.poll() is None, server.log.read_text()
            time.sleep(0.005)
        engines[0].suspend()  # long before it has torch: it cannot be ready between two requests
        while status(f"{server.url}/health/live") != 200:
            assert server.process.poll() is None, server.log.read_text()
            time.sleep(0.01)
        answer = httpx2.get(f"{server.url}/health/ready")
        refused = httpx2.post(f"{server.url}/generate", json=STORY)
        assert answer.status_code == 503, "torch was there before the API answered"
        assert "loading" in answer.json()["detail"]
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        engines[0].resume()
        server.wait_ready()
        assert list(server.events(STORY))[-1][0] == "done"


@pytest.mark.parametrize("moment", ["engine spawned", "api live"])
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_starting_ends_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sig: int, moment: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running_server(tmp_path, ready=False) as server:
        api = psutil.Process(server.process.pid)
        while not api.children():
            time.sleep(0.005)
        while moment == "api live" and status(f"{server.url}/health/live") != 200:
            time.sleep(0.005)
        assert server.stop(sig) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()
        assert not list(tmp_path.glob("vitrine-*")), "the engine's folder was left behind"


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_both_processes_with_status_0(tmp_path: Path, sig: int) -> None:
    with running_server(tmp_path) as server:
        engine = server.engine
        assert server.stop(sig) == 0, server.log.read_text()
        psutil.wait_procs([engine], timeout=5)
        assert not engine.is_running()
        assert "Traceback" not in server.log.read_text()


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    with running_server(tmp_path, unhurried=True) as server:
        events = server.events(STORY | {"max_tokens": 400})
        next(events)
        next(events)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert status(f"{server.url}/health/ready") == 503
        assert status(f"{server.url}/health/live") == 200
        refused = httpx2.post(f"{server.url}/generate", json=STORY)
        assert refused.status_code == 503
        server.hurry()
        last = list(events)[-1]
        assert last[0] == "done"
        assert last[1]["finish_reason"] == "length"
        assert server.process.wait(10) == 0


def test_what_outlasts_the_grace_time_ends_as_cancelled(tmp_path: Path) -> None:
    with running_server(tmp_path, "--drain-s", "0.2") as server:
        os.kill(server.engine.pid, signal.SIGSTOP)  # so that the request cannot finish
        got: list[tuple[str, dict[str, object]]] = []
        reader = threading.Thread(target=lambda: got.extend(server.events(STORY)))
        reader.start()
        time.sleep(0.3)
        assert server.stop(limit_s=15) == 0
        reader.join(5)
        assert got[-1][0] == "done"
        assert got[-1][1]["finish_reason"] == "cancelled"


def test_killing_the_api_ends_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running_server(tmp_path) as server:
        engine = server.engine
        server.process.kill()
        _, alive = psutil.wait_procs([engine], timeout=5)
        assert not alive
        assert not list(tmp_path.glob("vitrine-*")), "the engine's folder was left behind"


def test_a_stream_outlives_the_death_of_the_engine(tmp_path: Path) -> None:
    with running_server(tmp_path, unhurried=True) as server:
        body = STORY | {"max_tokens": 400}
        events = server.events(body)
        for _ in range(5):
            next(events)
        server.engine.kill()
        server.hurry()
        rest = list(events)
        undisturbed = server.generate(body)["choices"][0]["text"]  # type: ignore[index]
        assert rest[-1][0] == "done"
        assert rest[-1][1]["text"] == undisturbed
        assert rest[-1][1]["usage"]["completion_tokens"] == 400  # type: ignore[index]


def test_a_client_that_goes_away_frees_its_blocks(server: Server) -> None:
    with httpx2.stream("POST", f"{server.url}/generate", json=STORY | {"max_tokens": 450}) as got:
        next(got.iter_lines())
    wait_until_nothing_in_flight(server)


def wait_until_nothing_in_flight(server: Server) -> None:
    """Neither the API nor the engine holds anything."""
    deadline = time.monotonic() + 5
    held = 'vitrine_kv_blocks{state="referenced"}'
    while gauge(server, "vitrine_requests_in_flight") > 0 or gauge(server, held) > 0:
        assert time.monotonic() < deadline, "requests or blocks still held after 5 s"
        time.sleep(0.02)


def gauge(server: Server, name: str) -> float:
    """The value of a metric without labels."""
    for line in httpx2.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.split()[1])
    raise AssertionError(f"/metrics has no {name}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--model", "a" * 300], "File name too long"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--max-model-len", "0"], "--max-model-len '0'"),
        (["--max-batched-tokens", "8"], "--max-batched-tokens 8 is less than --max-num-seqs 64"),
        (["--kv-cache-gb", "0.000001"], "does not hold one block"),
        (["--kv-cache-gb", "4000000"], "allocate"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    with running_server(tmp_path, *flags, ready=False) as server:
        assert server.process.wait(30) == 1
        lines = server.log.read_text()
        assert message in lines.splitlines()[-1]
        assert "Traceback" not in lines


def test_every_request_is_counted_once_whatever_becomes_of_it(server: Server) -> None:
    """Law 1: accepted = finished + aborted + failed + in flight, over all ways to end."""
    before = counts(server)
    list(server.events(STORY | {"max_tokens": 5}))
    server.generate(STORY | {"max_tokens": 5, "n": 3})
    with httpx2.stream("POST", f"{server.url}/generate", json=STORY | {"max_tokens": 450}) as got:
        next(got.iter_lines())
    timed_out = server.generate(STORY | {"max_tokens": 450, "timeout_s": 0.05})
    assert timed_out["choices"][0]["finish_reason"] == "timeout"  # type: ignore[index]
    refused = httpx2.post(f"{server.url}/generate", json=STORY | {"max_tokens": 10_000})
    assert refused.status_code == 422
    wait_until_nothing_in_flight(server)
    after = counts(server)
    gone = {name: after[name] - before[name] for name in after}
    assert gone == {"accepted": 4, "finished": 3, "aborted": 1, "failed": 0}


def counts(server: Server) -> dict[str, float]:
    """How many requests were accepted, and how many ended in each way."""
    totals = dict.fromkeys(("accepted", "finished", "aborted", "failed"), 0.0)
    for line in httpx2.get(f"{server.url}/metrics").text.splitlines():
        for name in totals:
            if line.startswith(f"vitrine_requests_{name}_total"):
                totals[name] += float(line.split()[-1])
    return totals
