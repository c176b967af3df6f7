"""`vitrine serve --tensor-parallel-size 2` on a CPU: two processes that are one engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.poisoned_rank import POISON_TOKENS
from tests.servers import Server, running_server
from tests.service.test_faults import RESTARTS, metric

TWO = ("--tensor-parallel-size", "2", "--threads", "1", "--dtype", "float32")
BODIES: list[dict[str, object]] = [
    {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 60},
    {"prompt": "The dog", "temperature": 0.8, "seed": 3, "max_tokens": 60, "logprobs": 2},
    {"prompt": "Lily and Tom", "seed": 4, "top_p": 0.9, "repetition_penalty": 1.2},
    {"prompt": "x " * 150, "temperature": 0, "max_tokens": 8, "ignore_eos": True},
]
LONG = {"prompt": "Once", "temperature": 0, "max_tokens": 120, "ignore_eos": True}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("pair"), *TWO) as running:
        yield running


def ranks_of(server: Server) -> list[psutil.Process]:
    """The processes under the engine, which have the other parts of its model."""
    return [child for child in server.engine.children() if "service.engine.rank" in child.cmdline()]


def gone(processes: list[psutil.Process], limit_s: float = 10) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=limit_s)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BODIES)))
def test_streams_have_the_tokens_of_one_process(pair: Server, server: Server, number: int) -> None:
    """Greedy, seeded, with penalties, and a prompt in chunks; after each other, and at once."""
    streams = [list(one.events(BODIES[number])) for one in (pair, server)]
    ids = [
        [token for event, data in events if event == "token" for token in data["token_ids"]]
        for events in streams
    ]
    assert ids[0] == ids[1]
    assert len(ids[0]) >= 8


@pytest.mark.slow
def test_info_says_what_it_is_and_what_it_does_not_do(pair: Server) -> None:
    info = httpx2.get(f"{pair.url}/info").json()
    assert info["tensor_parallel_size"] == 2
    assert info["attention_backend"] == "cuda-twins"
    assert info["num_heads"] == 8, "of the whole model"
    assert len(ranks_of(pair)) == 1
    refused = httpx2.post(f"{pair.url}/explain", json={"prompt": "Once"})
    assert refused.status_code == 403
    assert "cut into 2 parts" in refused.json()["detail"]
    refused = httpx2.post(f"{pair.url}/generate", json={"prompt": "Once", "explain": True})
    assert refused.status_code == 422


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["rank 0", "rank 1"])
def test_a_stream_outlives_the_death_of_a_rank(pair: Server, victim: int) -> None:
    """All of them are replaced, and none is left over."""
    expected = next(data["text"] for event, data in pair.events(LONG) if event == "done")
    before = [pair.engine, *ranks_of(pair)]
    tokens = 0
    for event, data in pair.events(LONG):
        tokens += event == "token"
        if tokens == 20 and before[victim].is_running():
            before[victim].kill()
        if event == "done":
            assert data["text"] == expected
            assert data["finish_reason"] == "length"
            break
    else:
        pytest.fail("the stream ended without done")
    assert gone(before)
    assert not {p.pid for p in before} & {pair.engine.pid, *(p.pid for p in ranks_of(pair))}


def shortages(server: Server) -> float:
    return metric(server, "vitrine_engine_memory_shortages_total")


@pytest.mark.slow
@pytest.mark.parametrize("guilty", [0, 1], ids=["rank 0", "rank 1"])
def test_a_step_that_one_rank_has_no_memory_for_is_made_smaller(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guilty: int
) -> None:
    """It fails between two sums, for which the other rank waits. Nobody dies."""
    monkeypatch.setenv("POISON", f"rank {guilty} memory")
    requests = [BODIES[number] | {"max_tokens": 20} for number in (0, 1, 2)]
    with (
        running_server(tmp_path, *TWO, module="tests.poisoned_server") as poor,
        ThreadPoolExecutor(3) as pool,
    ):
        texts = [pool.submit(text_of, poor, body) for body in requests]
        assert [text.result() for text in texts] == [text_of(server, body) for body in requests]
        assert shortages(poor) > 0
        assert metric(poor, RESTARTS) == 0
        assert metric(poor, "vitrine_requests_failed_total") == 0


@pytest.mark.slow
def test_what_one_rank_cannot_do_costs_that_request_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POISON", "rank 1 raise")
    with (
        running_server(tmp_path, *TWO, module="tests.poisoned_server") as ill,
        ThreadPoolExecutor(3) as pool,
    ):
        expected = text_of(ill, LONG)
        healthy = [pool.submit(text_of, ill, LONG) for _ in range(2)]
        guilty = ill.events({"prompt": POISON_TOKENS, "max_tokens": 5})
        *_, (event, data) = guilty
        assert event == "error"
        assert "/somewhere" not in str(data)
        assert [text.result() for text in healthy] == [expected] * 2
        assert metric(ill, RESTARTS) == 0
        assert metric(ill, "vitrine_requests_failed_total") == 1


def text_of(server: Server, body: dict[str, object]) -> object:
    return next(data["text"] for event, data in server.events(body) if event == "done")


def interrupt(server: Server) -> None:
    server.process.send_signal(signal.SIGINT)


def terminate(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)


def kill_api(server: Server) -> None:
    server.process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("end", [interrupt, terminate, kill_api])
def test_nothing_is_left_behind(tmp_path: Path, end: Callable[[Server], None]) -> None:
    """In the middle of a stream, too."""
    with running_server(tmp_path, *TWO, "--drain-s", "0") as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert ranks_of(server)
        events = server.events(LONG | {"max_tokens": 400})
        for _ in range(3):
            next(events)
        end(server)
        assert gone(family)
        status = server.process.wait(10)
        assert status == (0 if end is not kill_api else -signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--tensor-parallel-size", "3"), "num_kv_heads 4 cannot be cut into 3 parts"),
        (("--tensor-parallel-size", "2", "--dtype", "int8"), "dtype int8 is not for"),
        (("--tensor-parallel-size", "0"), "--tensor-parallel-size '0'"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(flags: tuple[str, ...], reason: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service", "serve", "--port", "0", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        env={k: v for k, v in os.environ.items() if not k.startswith("VITRINE_")},
    )
    assert done.returncode != 0
    assert reason in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_benchmark_runs_over_two_ranks_and_leaves_none(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = ["bench", *TWO, "--shape", "stories15m", "--batch", "2", "--repeat", "1"]
    words += ["--prompt-len", "8", "--output-len", "8", "--json", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "service", *words], stdout=subprocess.DEVNULL)
    family = psutil.Process(process.pid)
    ranks: list[psutil.Process] = []
    while process.poll() is None:
        ranks = family.children(recursive=True) or ranks
        time.sleep(0.05)
    assert process.returncode == 0
    assert '"tensor_parallel_size": 2' in out.read_text()
    assert ranks
    assert gone(ranks)
