"""Explanations from a real server: the numbers hold together, and faults end them in order."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from service.api.explain_answers import ExplainAnswer
from tests.poisoned_engine import POISONED_PROMPT
from tests.servers import Server, running_server
from tests.service.test_faults import RESTARTS, balanced, bodies, metric, streaming, wait_for

STORY = {"prompt": "Once upon a time there", "seed": 4, "max_tokens": 40, "ignore_eos": True}
THREADS = ("--threads", "1")
HEADS = [[0, 1], [4, 7]]
ALICE = {"authorization": "Bearer alice-key"}
BOB = {"authorization": "Bearer bob-key"}


def ask(server: Server, timeout: float = 60, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{server.url}/explain", json=body, timeout=timeout)


def explained(server: Server, **body: Any) -> dict[str, Any]:
    response = ask(server, **body)
    assert response.status_code == 200, response.text
    msgspec.json.decode(response.content, type=ExplainAnswer)
    answer: dict[str, Any] = response.json()
    return answer


def counts(server: Server) -> dict[str, float]:
    """How explanations ended, and law 1 of theirs."""
    outcomes = ("finished", "aborted", "failed", "timeout", "refused")
    found = {
        outcome: metric(server, f'vitrine_explain_requests_total{{outcome="{outcome}"}}')
        for outcome in outcomes
    }
    accepted = metric(server, "vitrine_explain_accepted_total")
    assert accepted >= sum(found.values())
    return found | {"accepted": accepted}


def test_everything_there_is_to_ask_for(server: Server) -> None:
    prompt = "Once upon a time there was a little bird. The bird"
    answer = explained(
        server,
        prompt=prompt,
        attention="full",
        lens=3,
        lens_positions=[0, 4],
        candidates=7,
        head={"layer": 2, "head": 5, "query": 6},
        ablate={"heads": [[0, 0], [4, 7]], "edges": [[8, 2]]},
        max_tokens=6,
    )
    info = httpx2.get(f"{server.url}/info").json()
    num_layers, num_heads = info["num_layers"], info["num_heads"]
    ids = httpx2.post(f"{server.url}/tokenize", json={"text": prompt}).json()
    assert [one["token_id"] for one in answer["tokens"]] == ids["token_ids"]
    assert [one["start"] for one in answer["tokens"]] == [one["start"] for one in ids["tokens"]]
    full = answer["attention"]["full"]
    assert answer["attention"]["layers"] == list(range(num_layers))
    assert answer["attention"]["heads"] == list(range(num_heads))
    assert [len(of_layer) for of_layer in full] == [num_heads] * num_layers
    for of_layer in full:
        for rows in of_layer:
            assert [len(row) for row in rows] == list(range(1, len(ids["token_ids"]) + 1))
            for row in rows:
                assert sum(row) == pytest.approx(1, abs=1e-4)
    assert [len(row) for row in answer["entropy"]] == [num_heads] * num_layers
    assert len(answer["lens"]) == (num_layers + 1) * 2
    assert len(answer["next"]) == 7
    assert answer["head"]["weights"] == pytest.approx(full[2][5][6], abs=1e-5)
    greedy = server.generate({"prompt": prompt, "temperature": 0, "max_tokens": 6})
    assert answer["continuation"]["text"] == greedy["choices"][0]["text"]  # type: ignore[index]
    assert answer["ablated"]["kl"] > 0
    assert answer["ablated"]["changes"]
    assert answer["timing"]["compute_s"] > 0


def test_the_numbers_are_those_that_serve(server: Server) -> None:
    """Log-probabilities of an answer, from both routes."""
    answer = server.generate(STORY | {"logprobs": 0})
    told = [one["logprob"] for one in answer["choices"][0]["logprobs"]]  # type: ignore[index]
    seen = explained(server, request=answer["id"], attention="none", lens=0)["tokens"]
    assert [one["logprob"] for one in seen][-len(told) :] == pytest.approx(told, abs=1e-3)


def test_an_ablation_of_nothing_that_matters_and_of_all_that_does(server: Server) -> None:
    prompt = "The cat sat on the"
    every_head = [[layer, head] for layer in range(5) for head in range(8)]
    none = explained(server, prompt=prompt, ablate={"edges": [[0, 0]]} | {"edges": [[3, 2]]})
    everything = explained(server, prompt=prompt, ablate={"heads": every_head})
    assert none["ablated"]["kl"] < everything["ablated"]["kl"]
    assert everything["ablated"]["kl"] > 0.5
    refused = ask(server, prompt=prompt, ablate={"edges": [[0, 0]]})
    assert refused.status_code == 422
    assert refused.json()["field"] == "ablate"


def test_the_longest_text_with_all_of_its_attention(server: Server) -> None:
    limits = httpx2.get(f"{server.url}/info").json()["limits"]
    limit = limits["max_explain_tokens"]
    prompt = [5 + i for i in range(limit)]
    full = explained(server, prompt=prompt, attention="full")["attention"]["full"]
    assert len(full[0][0]) == limit
    refused = ask(server, prompt=[*prompt, 5])
    assert refused.status_code == 422
    assert f"{limit + 1} tokens; an explanation takes {limit}" in refused.json()["detail"]


def tokens_and_sights(events: list[tuple[str, dict[str, Any]]]) -> tuple[list[int], list[Any]]:
    """All of a stream's, checked to be parallel in each event."""
    ids: list[int] = []
    seen: list[Any] = []
    for kind, data in events:
        if kind == "token":
            assert len(data["explain"]) == len(data["token_ids"])
            ids += data["token_ids"]
            seen += data["explain"]
    assert events[-1][0] == "done", events[-1]
    return ids, seen


def check_sights(ids: list[int], seen: list[Any], num_prompt: int) -> None:
    for place, (token_id, one) in enumerate(zip(ids, seen, strict=True)):
        query = num_prompt + place - 1
        for attended in (one["attended"], *(head["attended"] for head in one["heads"])):
            weights = [each["weight"] for each in attended]
            assert 0 < len(weights) <= 8
            assert weights == sorted(weights, reverse=True)
            assert sum(weights) <= 1.0001
            assert all(0 <= each["position"] <= query for each in attended)
        assert [[head["layer"], head["head"]] for head in one["heads"]] == HEADS
        assert len(one["top"]) == 5
        assert isinstance(token_id, int)


def test_a_stream_that_explains_itself_says_the_same(server: Server) -> None:
    plain = [e for e in server.events(STORY) if e[0] == "token"]
    body = STORY | {"explain": True, "explain_heads": HEADS}
    ids, seen = tokens_and_sights(list(server.events(body)))
    assert ids == [token for _, data in plain for token in data["token_ids"]]  # type: ignore[attr-defined]
    check_sights(ids, seen, num_prompt=5)
    whole = server.generate(body)["choices"][0]  # type: ignore[index]
    assert whole["token_ids"] == ids
    assert whole["explain"] == seen
    # What the stream told is what /explain tells of the whole text.
    prompt = httpx2.post(f"{server.url}/tokenize", json={"text": STORY["prompt"]}).json()
    answer = explained(server, prompt=prompt["token_ids"] + ids[:-1], attention="mean", lens=0)
    row = answer["attention"]["mean"][-1]
    for one in seen[-1]["attended"]:
        assert one["weight"] == pytest.approx(row[one["position"]], abs=1e-3)


def test_many_continuations_and_a_resumed_stream(server: Server) -> None:
    body = STORY | {"explain": True, "explain_heads": HEADS, "n": 3, "detach_s": 20}
    first = list(server.events(body))
    request_id = first[0][1]["id"]
    with httpx2.stream("GET", f"{server.url}/generate/{request_id}", timeout=20) as response:
        again = [
            msgspec.json.decode(line.removeprefix("data: "))
            for line in response.iter_lines()
            if line.startswith("data: ")
        ]
    assert again == [data for _, data in first]
    for index in range(3):
        ids, seen = tokens_and_sights([e for e in first[1:] if e[1]["index"] == index])
        check_sights(ids, seen, num_prompt=5)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two keys."""
    folder: Path = tmp_path_factory.mktemp("explain")
    keys = folder / "keys"
    keys.write_text("alice:alice-key\nbob:bob-key\n")
    with running_server(folder, *THREADS, "--api-key-file", str(keys)) as server:
        yield server


def test_requests_are_explained_to_their_own_key(house: Server) -> None:
    def post(path: str, headers: dict[str, str], **body: Any) -> httpx2.Response:
        return httpx2.post(house.url + path, json=body, headers=headers, timeout=30)

    made = post("/generate", ALICE, **STORY, stream=False, n=2).json()
    assert post("/explain", {}, request=made["id"]).status_code == 401
    assert post("/explain", BOB, request=made["id"]).status_code == 404
    answer = post("/explain", ALICE, request=made["id"], index=1).json()
    assert answer["text"] == str(STORY["prompt"]) + made["choices"][1]["text"]
    assert post("/explain", ALICE, request=made["id"], index=2).status_code == 422


def in_background(pool: ThreadPoolExecutor, server: Server, **body: Any) -> Future[httpx2.Response]:
    return pool.submit(ask, server, **body)


def test_the_queue_is_bounded_and_a_client_that_leaves_frees_its_place(tmp_path: Path) -> None:
    flags = (*THREADS, "--max-explain-queue", "3")
    with running_server(tmp_path, *flags) as server, ThreadPoolExecutor(4) as pool:
        engine = server.engine
        engine.send_signal(signal.SIGSTOP)
        waiting = [in_background(pool, server, prompt=f"number {i}") for i in range(2)]
        gone = httpx2.Client(timeout=0.5)
        with pytest.raises(httpx2.TimeoutException):
            gone.post(f"{server.url}/explain", json={"prompt": "I have no time"})
        gone.close()
        wait_for(server, 'vitrine_explain_requests_total{outcome="aborted"}', 1)
        waiting.append(in_background(pool, server, prompt="number 2"))
        wait_for(server, "vitrine_explain_in_flight", 3)
        refused = ask(server, prompt="one too many")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert "3 explanations run or wait; the limit is 3" in refused.json()["detail"]
        engine.send_signal(signal.SIGCONT)
        assert [each.result(30).status_code for each in waiting] == [200] * 3
        assert counts(server) == {
            "finished": 3,
            "aborted": 1,
            "failed": 0,
            "timeout": 0,
            "refused": 0,
            "accepted": 4,
        }
        assert metric(server, "vitrine_explain_in_flight") == 0
        assert metric(server, "vitrine_explain_compute_seconds_total") > 0


def test_no_explain(tmp_path: Path) -> None:
    with running_server(tmp_path, *THREADS, "--no-explain") as server:
        refused = ask(server, prompt="a")
        assert refused.status_code == 403
        assert "--no-explain" in refused.json()["detail"]
        body = {"prompt": "a", "explain": True}
        refused = httpx2.post(f"{server.url}/generate", json=body)
        assert (refused.status_code, refused.json()["field"]) == (422, "explain")
        assert httpx2.get(f"{server.url}/info").json()["limits"]["max_explain_tokens"] == 0


@pytest.mark.slow
def test_a_guest_finishes_beside_streams_that_do_not_notice(tmp_path: Path) -> None:
    requests = bodies(4, max_tokens=400)
    with running_server(tmp_path, *THREADS, unhurried=True) as server, balanced(server):
        with ThreadPoolExecutor(2) as pool, streaming(server, requests) as streams:
            wait_for(server, 'vitrine_engine_state{state="busy"}', 1)
            guests = [
                in_background(pool, server, prompt="A guest who came", max_tokens=4)
                for _ in range(2)
            ]
            server.hurry()
        with streaming(server, requests) as expected:
            pass
        assert [s.result() for s in streams] == [e.result() for e in expected]
        assert [guest.result(60).status_code for guest in guests] == [200, 200]


@pytest.mark.slow
def test_explanations_and_explaining_streams_outlive_engines(tmp_path: Path) -> None:
    requests = [
        one | {"explain": True, "explain_heads": HEADS} for one in bodies(4, max_tokens=450)
    ]
    with running_server(tmp_path, *THREADS, unhurried=True) as server, balanced(server):
        with ThreadPoolExecutor(6) as pool:
            streams = [pool.submit(lambda b=body: list(server.events(b))) for body in requests]
            guests: list[Future[httpx2.Response]] = []
            for kills in range(2):
                wait_for(server, RESTARTS, kills)
                wait_for(server, 'vitrine_engine_state{state="busy"}', 1)
                time.sleep(0.2)
                engine = server.engine
                engine.send_signal(signal.SIGSTOP)
                guests.append(in_background(pool, server, prompt=f"number {kills}"))
                wait_for(server, "vitrine_explain_accepted_total", kills + 1)
                engine.kill()
            server.hurry()
            expected = [tokens_and_sights(list(server.events(one))) for one in requests]
            assert [guest.result(60).status_code for guest in guests] == [200, 200]
            for stream, (ids, seen) in zip(streams, expected, strict=True):
                found_ids, found = tokens_and_sights(stream.result(60))
                assert found_ids == ids
                check_sights(found_ids, found, num_prompt=len(found[0]["attended"]))
                for one, other in zip(found, seen, strict=True):
                    assert [p["weight"] for p in one["attended"]] == pytest.approx(
                        [p["weight"] for p in other["attended"]], abs=1e-3
                    )
        assert counts(server)["finished"] == 2
        assert metric(server, RESTARTS) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "num_dead"), [("raise", 0), ("abort", 2), ("hang", 2)])
def test_a_guest_at_fault_hurts_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, num_dead: int
) -> None:
    monkeypatch.setenv("POISON", fault)
    requests = bodies(4, max_tokens=250)
    flags = (*THREADS, "--stall-s", "2")
    with (
        running_server(tmp_path, *flags, unhurried=True) as server,
        balanced(server),
        ThreadPoolExecutor(2) as pool,
    ):
        with streaming(server, requests) as streams:
            wait_for(server, 'vitrine_engine_state{state="busy"}', 1)
            guilty = in_background(pool, server, prompt=POISONED_PROMPT)
            innocent = in_background(pool, server, prompt="Another guest")
            guilty.result(60)
            server.hurry()
        with streaming(server, requests) as expected:
            pass
        assert [s.result() for s in streams] == [e.result() for e in expected]
        answer = guilty.result(60)
        assert answer.status_code == 500
        assert "/" not in answer.json()["detail"]
        assert innocent.result(60).status_code == 200
        assert metric(server, RESTARTS) == num_dead
        assert metric(server, "vitrine_requests_failed_total") == 0
        assert counts(server)["failed"] == 1


@pytest.mark.slow
def test_sigterm_lets_an_explanation_finish_or_says_why_not(tmp_path: Path) -> None:
    flags = (*THREADS, "--drain-s", "1")
    with running_server(tmp_path, *flags) as server, ThreadPoolExecutor(1) as pool:
        server.engine.send_signal(signal.SIGSTOP)
        guest = in_background(pool, server, prompt="the last one")
        wait_for(server, "vitrine_explain_in_flight", 1)
        server.process.send_signal(signal.SIGTERM)
        answer = guest.result(20)
        assert answer.status_code == 503
        assert "shutting down" in answer.json()["detail"]
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log.read_text()
