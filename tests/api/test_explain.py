"""POST /explain and explaining streams on a scripted engine: what is let in, and what comes out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from service.api.explain_admission import spans_of
from service.api.explain_answers import ExplainAnswer
from service.api.recent import MAX_REQUESTS, RecentRequests
from service.client import EngineUnavailableError, QueueFullError
from service.engine.explain_messages import (
    AblatedRun,
    EndExplain,
    Explain,
    Explained,
    ExplainPart,
    HeadNumbers,
    LensRow,
)
from tests.api.conftest import House, make_tokenizer
from tests.api.fake_engine import CONTEXT_LENGTH, VOCAB_SIZE, say
from tests.api.test_http import check_problem
from tests.api.test_quotas import ALICE, BOB, KEYS

Houses = Callable[..., House]
LIMIT = 256
HEAD = HeadNumbers(
    layer=1,
    head=3,
    kv_head=1,
    query=1,
    head_dim=1,
    scale=1.0,
    q=[1.0],
    keys=[[0.0], [1.0]],
    values=[[0.5], [1.5]],
    scores=[0.0, 1.0],
    scaled=[0.0, 1.0],
    visible=[True, True],
    weights=[0.25, 0.75],
    output=[1.25],
)


def asked(house: House) -> Explain:
    """The explanation that the engine got last."""
    message = house.engine.sent_to_guest[-1]
    assert isinstance(message, Explain)
    return message


async def explained(
    house: House, body: dict[str, Any], *parts: ExplainPart, answer: dict[str, Any] | None = None
) -> dict[str, Any]:
    """POST /explain, and what the client gets when the engine says this."""
    exchange = house.exchange(body, path="/explain")
    await exchange.until(lambda: house.engine.sent_to_guest or exchange.status)
    assert exchange.status is None, exchange.body
    request = asked(house)
    scores = [(-1.0, 2)] * (len(request.token_ids) - 1)
    for part in parts:
        house.engine.answer(msgspec.structs.replace(part, id=request.id))
    house.engine.answer(Explained(request.id, token_scores=scores, **(answer or {})))
    await exchange.finish()
    assert exchange.status == 200, exchange.body
    assert exchange.headers["content-length"] == str(len(exchange.body))
    msgspec.json.decode(exchange.body, type=ExplainAnswer)  # as documented
    found: dict[str, Any] = json.loads(exchange.body)
    return found


async def test_the_whole_answer(house: Houses) -> None:
    h = house()
    found = await explained(
        h,
        {
            "prompt": 'a "full":[] b',
            "attention": "full",
            "layers": [1],
            "heads": [3],
            "max_tokens": 2,
            "ablate": {"heads": [[0, 1]]},
            "head": {"layer": 1, "head": 3, "query": 1},
        },
        ExplainPart(0, attention=b"[[[[1.0],"),
        ExplainPart(0, lens=[LensRow(0, 2, [(65, -0.5)])]),
        ExplainPart(0, attention=b"[0.25,0.75]]]]", lens=[LensRow(1, 2, [(66, -0.25)])]),
        answer={
            "compute_s": 0.5,
            "entropy": [[0.75]],
            "next": [(65, -0.1)],
            "head": HEAD,
            "continuation": [65, 66],
            "ablated": AblatedRun([(66, -0.2)], 0.125, [(65, -0.1, -3.0)], [66, 66]),
        },
    )
    text = h.tokenizer.token_text
    assert found["text"] == 'a "full":[] b'
    assert found["model"] == "case"
    assert found["attention"] == {
        "kind": "full",
        "layers": [1],
        "heads": [3],
        "full": [[[[1.0], [0.25, 0.75]]]],
    }
    first, *rest = found["tokens"]
    assert (first["logprob"], first["rank"]) == (None, None)
    assert {(token["logprob"], token["rank"]) for token in rest} == {(-1.0, 2)}
    for token in found["tokens"]:
        assert token["text"] == found["text"][token["start"] : token["end"]]
    assert found["lens"] == [
        {"layer": 0, "position": 2, "candidates": [candidate(65, -0.5, text)]},
        {"layer": 1, "position": 2, "candidates": [candidate(66, -0.25, text)]},
    ]
    assert found["head"] == msgspec.to_builtins(HEAD)
    assert found["entropy"] == [[0.75]]
    assert found["next"] == [candidate(65, -0.1, text)]
    assert found["continuation"] == {"text": text(65) + text(66), "token_ids": [65, 66]}
    assert found["ablated"] == {
        "next": [candidate(66, -0.2, text)],
        "kl": 0.125,
        "changes": [{"token_id": 65, "text": text(65), "logprob": -0.1, "logprob_ablated": -3.0}],
        "continuation": {"text": text(66) * 2, "token_ids": [66, 66]},
    }
    assert found["timing"]["compute_s"] == 0.5
    counts = h.counts()
    assert counts["explain_requests_total:finished"] == counts["explain_accepted_total"] == 1
    assert counts["explain_compute_seconds_total"] == 0.5
    assert counts["explain_in_flight"] == 0


def candidate(token_id: int, logprob: float, text: Callable[[int], str]) -> dict[str, Any]:
    return {"token_id": token_id, "text": text(token_id), "logprob": logprob}


async def test_what_is_absent_is_the_default(house: Houses) -> None:
    h = house()
    found = await explained(h, {"prompt": [65, 66, 67]}, ExplainPart(0, attention=b"[]"))
    assert set(found["attention"]) == {"kind", "layers", "heads", "top"}
    assert not {"head", "continuation", "ablated"} & set(found)
    wish = asked(h).wish
    assert (wish.layers, wish.heads) == ([0, 1], [0, 1, 2, 3])
    assert (wish.attention, wish.top_k, wish.lens, wish.candidates) == ("top", 8, 5, 10)
    assert (wish.lens_positions, wish.head, wish.ablate, wish.max_tokens) == ([2], None, None, 0)


async def test_without_attention_and_lens(house: Houses) -> None:
    found = await explained(house(), {"prompt": "a", "attention": "none", "lens": 0})
    assert set(found["attention"]) == {"kind", "layers", "heads"}
    assert found["lens"] == []


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, "prompt", "exactly one of prompt and request"),
        ({"prompt": "a", "request": "b"}, "prompt", "both were sent"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [VOCAB_SIZE]}, "prompt", f"vocabulary of {VOCAB_SIZE}"),
        (
            {"prompt": [1] * (LIMIT + 1)},
            "prompt",
            f"{LIMIT + 1} tokens; an explanation takes {LIMIT}",
        ),
        ({"prompt": "東" * LIMIT}, "prompt", f"takes {LIMIT}"),
        ({"prompt": "x" * 90_000}, "prompt", "at least"),
        ({"prompt": "a", "index": -1}, "index", "greater than or equal to 0"),
        ({"prompt": "a", "layers": [2]}, "layers", "2; there are 2 layers"),
        ({"prompt": "a", "layers": [0, 1, 0]}, "layers", "3 were sent, 2 of them different"),
        ({"prompt": "a", "layers": []}, "layers", "at least 1 item"),
        ({"prompt": "a", "layers": [-1]}, "layers", "greater than or equal to 0"),
        ({"prompt": "a", "heads": [4]}, "heads", "4; there are 4 heads"),
        ({"prompt": "a", "heads": [True]}, "heads", "valid integer"),
        ({"prompt": "a", "attention": "all"}, "attention", "'top', 'full', 'mean' or 'none'"),
        ({"prompt": "a", "top_k": 33}, "top_k", "less than or equal to 32"),
        ({"prompt": "a", "top_k": 0}, "top_k", "greater than or equal to 1"),
        ({"prompt": "a", "lens": 21}, "lens", "less than or equal to 20"),
        ({"prompt": "a", "lens_positions": [1]}, "lens_positions", "1; there are 1 tokens"),
        ({"prompt": "a", "candidates": 0}, "candidates", "greater than or equal to 1"),
        ({"prompt": "a", "candidates": 21}, "candidates", "less than or equal to 20"),
        ({"prompt": "a", "head": {"layer": 2, "head": 0, "query": 0}}, "head", "layer 2; there"),
        ({"prompt": "a", "head": {"layer": 0, "head": 4, "query": 0}}, "head", "head 4; there"),
        ({"prompt": "a", "head": {"layer": 0, "head": 0, "query": 1}}, "head", "query 1; there"),
        ({"prompt": "a", "head": {"layer": 0}}, "head", "required"),
        ({"prompt": "a", "ablate": {}}, "ablate", "nothing to switch off"),
        ({"prompt": "a", "ablate": {"heads": [[2, 0]]}}, "ablate", "layer 2; there are 2"),
        ({"prompt": "a", "ablate": {"heads": [[0, 0], [0, 0]]}}, "ablate", "1 of them different"),
        ({"prompt": "a", "ablate": {"heads": [[0, 0]] * 65}}, "ablate", "at most 64 items"),
        ({"prompt": "a", "ablate": {"heads": [[0]]}}, "ablate", "at least 2 items"),
        ({"prompt": [1, 2], "ablate": {"edges": [[0, 1]]}}, "ablate", "query 0 to key 1"),
        ({"prompt": [1, 2], "ablate": {"edges": [[2, 1]]}}, "ablate", "query 2; there are 2"),
        ({"prompt": "a", "ablate": {"edges": [[0, 0]] * 257}}, "ablate", "at most 256 items"),
        ({"prompt": "a", "max_tokens": 33}, "max_tokens", "less than or equal to 32"),
        ({"prompt": [1] * LIMIT, "max_tokens": 1}, "max_tokens", f"length of {CONTEXT_LENGTH}"),
        ({"prompt": "a", "temperature": 1}, "temperature", "unknown or unsupported"),
    ],
)
async def test_a_wrong_field_is_refused_with_value_and_limit(
    house: Houses, body: dict[str, Any], field: str, words: str
) -> None:
    h = house()
    async with h.client() as client:
        problem = check_problem(await client.post("/explain", json=body), 422)
    assert problem["field"] == field
    assert words in problem["detail"]
    assert not h.engine.sent_to_guest
    assert h.counts()["requests_rejected_total:invalid-request"] == 1


@pytest.mark.parametrize(
    ("limits", "body", "field", "numbers"),
    [
        (
            {"max_explain_weights": 799},
            {"attention": "full"},
            "attention",
            "800 weights; the limit is 799",
        ),
        (
            {"max_explain_weights": 99},
            {"attention": "mean"},
            "attention",
            "100 weights; the limit is 99",
        ),
        (
            {"max_explain_weights": 159},
            {"attention": "top", "top_k": 2},
            "attention",
            "160 weights; the limit is 159",
        ),
        ({"max_explain_lens": 14}, {"lens": 5}, "lens", "are 15; the limit is 14"),
        (
            {"max_explain_recorded": 799},
            {"attention": "none"},
            "layers",
            "800 weights to compute; the limit is 799",
        ),
        ({"max_explain_tokens": 9}, {}, "prompt", "10 tokens; an explanation takes 9"),
    ],
)
async def test_sizes_are_bounded_by_what_info_says(
    house: Houses, limits: dict[str, int], body: dict[str, Any], field: str, numbers: str
) -> None:
    body = {"prompt": [1] * 10} | body
    h = house(**limits)
    async with h.client() as client:
        problem = check_problem(await client.post("/explain", json=body), 422)
        told = (await client.get("/info")).json()["limits"]
    assert problem["field"] == field
    assert numbers in problem["detail"]
    assert {name: told[name] for name in limits} == limits
    # One more, and it goes in.
    h = house(**{name: value + 1 for name, value in limits.items()})
    exchange = h.exchange(body, path="/explain")
    await exchange.until(lambda: h.engine.sent_to_guest)
    exchange.disconnect()
    await exchange.finish()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (QueueFullError("8 explanations run or wait; the limit is 8", 3.5), 429),
        (EngineUnavailableError("the engine is loading the model", 2.0), 503),
    ],
)
async def test_refused_at_the_door(house: Houses, error: Exception, status: int) -> None:
    h = house()
    h.engine.refuse = error
    async with h.client() as client:
        response = await client.post("/explain", json={"prompt": "a"})
    assert check_problem(response, status)["detail"] == str(error)
    assert int(response.headers["retry-after"]) >= 2
    assert h.counts()["explain_accepted_total"] == 0


async def test_a_server_that_explains_nothing_says_so(house: Houses) -> None:
    h = house(say(65), max_explain_tokens=0)
    async with h.client() as client:
        problem = check_problem(await client.post("/explain", json={"prompt": "a"}), 403)
        assert "--no-explain" in problem["detail"]
        body = {"prompt": "a", "explain": True}
        problem = check_problem(await client.post("/generate", json=body), 422)
        assert problem["field"] == "explain"
        assert "--no-explain" in problem["detail"]
        plain = await client.post("/generate", json={"prompt": "a", "explain": False})
        assert plain.status_code == 200
        assert len(h.context.recent.find((None, plain.headers["x-request-id"])) or []) == 0


async def test_a_client_that_goes_away_ends_it(house: Houses) -> None:
    h = house()
    exchange = h.exchange({"prompt": "a"}, path="/explain")
    await exchange.until(lambda: h.engine.sent_to_guest)
    request = asked(h)
    exchange.disconnect()
    await exchange.finish()
    assert h.engine.sent_to_guest[-1] == EndExplain(request.id)
    assert h.counts()["explain_requests_total:aborted"] == 1
    assert len(h.engine.guests) == 0


async def test_an_answer_that_is_being_sent_holds_its_place(house: Houses) -> None:
    h = house()
    exchange = h.exchange({"prompt": "a"}, path="/explain")
    await exchange.until(lambda: h.engine.sent_to_guest)
    exchange.may_send.clear()
    h.engine.answer(ExplainPart(asked(h).id, attention=b"[]"))
    h.engine.answer(Explained(asked(h).id))
    await exchange.until(lambda: exchange.sends_waiting)
    assert len(h.engine.guests) == 1
    assert h.counts()["explain_in_flight"] == 1
    exchange.disconnect()
    await exchange.until(exchange.task.done)
    assert len(h.engine.guests) == 0
    assert h.counts()["explain_requests_total:aborted"] == 1


@pytest.mark.parametrize(
    ("answer", "status", "outcome"),
    [
        ({"refusal": "the edges leave query 0 no key"}, 422, "refused"),
        ({"error": "RuntimeError: /secret/path"}, 500, "failed"),
    ],
)
async def test_what_the_engine_cannot_do(
    house: Houses, answer: dict[str, str], status: int, outcome: str
) -> None:
    h = house()
    exchange = h.exchange({"prompt": "a"}, path="/explain")
    await exchange.until(lambda: h.engine.sent_to_guest)
    h.engine.answer(Explained(asked(h).id, **answer))  # type: ignore[arg-type]
    await exchange.finish()
    assert exchange.status == status
    assert b"secret" not in exchange.body
    assert h.counts()[f"explain_requests_total:{outcome}"] == 1
    assert len(h.engine.guests) == 0


async def test_not_in_time(house: Houses) -> None:
    h = house(explain_timeout_s=0.05)
    async with h.client() as client:
        response = await client.post("/explain", json={"prompt": "a"})
    assert "within 0.05 s" in check_problem(response, 503)["detail"]
    assert int(response.headers["retry-after"]) >= 1
    assert h.counts()["explain_requests_total:timeout"] == 1
    assert isinstance(h.engine.sent_to_guest[-1], EndExplain)


async def test_the_server_shuts_down_meanwhile(house: Houses) -> None:
    h = house()
    exchange = h.exchange({"prompt": "a"}, path="/explain")
    await exchange.until(lambda: h.engine.sent_to_guest)
    h.engine.guests.end_all(EngineUnavailableError("the server is shutting down", 5))
    await exchange.finish()
    assert exchange.status == 503
    assert h.counts()["explain_requests_total:failed"] == 1


async def test_a_key_s_requests_and_tokens_are_its_limits(house: Houses) -> None:
    h = house(api_keys=KEYS, max_requests_per_key=1, max_tokens_per_minute_per_key=20)
    body = {"prompt": [65] * 10, "max_tokens": 5}
    exchange = h.exchange(body, path="/explain", headers=ALICE)
    await exchange.until(lambda: h.engine.sent_to_guest)
    async with h.client() as client:
        busy = await client.post("/explain", json=body, headers=ALICE)
        assert check_problem(busy, 429)["type"].endswith("key-concurrency")
        exchange.disconnect()
        await exchange.finish()
        spent = await client.post("/explain", json=body, headers=ALICE)
        assert check_problem(spent, 429)["type"].endswith("key-rate")
        assert (await client.post("/explain", json=body)).status_code == 401
    other = h.exchange(body, path="/explain", headers=BOB)
    await other.until(lambda: len(h.engine.guests) == 1)
    other.disconnect()
    await other.finish()


async def test_a_recent_request_by_its_id(house: Houses) -> None:
    h = house(say(66, 67), api_keys=KEYS)
    async with h.client() as client:
        sent = {"prompt": [65], "n": 2, "stream": False}
        request_id = (await client.post("/generate", json=sent, headers=ALICE)).json()["id"]
        for headers, body in (
            (BOB, {"request": request_id}),
            (ALICE, {"request": request_id + "x"}),
        ):
            problem = check_problem(await client.post("/explain", json=body, headers=headers), 404)
            assert problem["field"] == "request"
        body = {"request": request_id, "index": 2}
        problem = check_problem(await client.post("/explain", json=body, headers=ALICE), 422)
        assert "2; there are 2 continuations" in problem["detail"]
    exchange = h.exchange({"request": request_id, "index": 1}, path="/explain", headers=ALICE)
    await exchange.until(lambda: h.engine.sent_to_guest)
    assert asked(h).token_ids == [65, 66, 67]
    exchange.disconnect()
    await exchange.finish()


async def test_a_request_that_still_runs_has_what_came(house: Houses) -> None:
    h = house()
    stream = h.exchange({"prompt": [65], "max_tokens": 9}, headers={"X-Request-Id": "mine"})
    await stream.until_events(1)
    h.engine.streams[0].give(66)
    await stream.until_events(2)
    exchange = h.exchange({"request": "mine"}, path="/explain")
    await exchange.until(lambda: h.engine.sent_to_guest)
    assert asked(h).token_ids == [65, 66]
    for one in (exchange, stream):
        one.disconnect()
        await one.finish()


async def test_a_request_that_is_too_long_is_counted_and_not_kept(house: Houses) -> None:
    h = house(say(66), max_explain_tokens=3)
    async with h.client() as client:
        sent = {"prompt": [65] * 3, "stream": False}
        request_id = (await client.post("/generate", json=sent)).json()["id"]
        problem = check_problem(await client.post("/explain", json={"request": request_id}), 422)
    assert problem["field"] == "request"
    assert "4 tokens; an explanation takes 3" in problem["detail"]


def test_recent_requests_are_bounded() -> None:
    recent = RecentRequests(max_tokens=4)
    for number in range(MAX_REQUESTS + 1):
        recent.add(("alice", str(number)), [[number]])
    recent.add(("bob", "0"), [[7]])
    assert recent.find(("alice", "0")) is None
    assert recent.find(("alice", "1")) is not None
    (log,) = recent.find(("bob", "0")) or []
    log.extend([1, 2])
    log.extend([3])
    assert log.token_ids == [7, 1, 2, 3]
    log.extend([4])
    assert (log.token_ids, log.num_tokens) == (None, 5)
    (again,) = recent.add(("bob", "0"), [[8]])
    assert recent.find(("bob", "0")) == [again]


@pytest.mark.parametrize("text", ["a case", "naïve 東京 \U0001f600", "<|endoftext|>x"])
def test_spans_of_ids_are_those_of_the_text(text: str) -> None:
    tokenizer = make_tokenizer()
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert spans_of(ids, tokenizer) == (text, offsets)


def test_spans_of_ids_that_begin_a_character() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("a\U0001f600")[:-1]
    text, spans = spans_of(ids, tokenizer)
    assert text == "a\ufffd"
    assert spans[0] == (0, 1)
    assert set(spans[1:]) == {(1, 2)}


EXPLAINING = {"prompt": [65], "max_tokens": 9, "explain": True, "explain_heads": [[1, 3], [0, 2]]}


def check_explained(data: dict[str, Any], text: Callable[[int], str]) -> None:
    assert len(data["explain"]) == len(data["token_ids"]) > 0
    for one in data["explain"]:
        assert one["attended"] == [
            {"position": 0, "weight": 0.75},
            {"position": 1, "weight": 0.25},
        ]
        assert [(head["layer"], head["head"]) for head in one["heads"]] == [(1, 3), (0, 2)]
        assert [head["attended"][0]["position"] for head in one["heads"]] == [3, 2]
        assert one["top"] == [candidate(j, -1.0 - j, text) for j in range(5)]


async def test_token_events_tell_what_their_tokens_saw(house: Houses) -> None:
    h = house()
    exchange = h.exchange(EXPLAINING)
    await exchange.until_events(1)
    stream = h.engine.streams[0]
    stream.give(66)
    await exchange.until_events(2)
    stream.give(67)
    stream.give(68)  # in one event with the one before
    await exchange.until_events(3)
    stream.give(69, finish="length")
    events = [event.data for event in await exchange.finish() if event.type == "token"]
    tokens = [json.loads(data) for data in events]
    assert [data["token_ids"] for data in tokens] == [[66], [67, 68], [69]]
    for data in tokens:
        check_explained(data, h.tokenizer.token_text)
        assert "logprobs" not in data
    request = h.engine.requests[0]
    assert request.explain == [(1, 3), (0, 2)]
    assert request.sampling.logprobs is None


@pytest.mark.parametrize("logprobs", [0, 2, 20])
async def test_log_probabilities_beside_explanations_are_as_asked_for(
    house: Houses, logprobs: int
) -> None:
    h = house(say(66, 67))
    async with h.client() as client:
        body = EXPLAINING | {"stream": False, "logprobs": logprobs, "n": 2}
        answer = (await client.post("/generate", json=body)).json()
    for choice in answer["choices"]:
        check_explained(choice, h.tokenizer.token_text)
        assert [len(one["top"]) for one in choice["logprobs"]] == [logprobs] * 2
    assert h.engine.requests[0].sampling.logprobs == logprobs


async def test_tokens_after_a_stop_string_are_not_told_of(house: Houses) -> None:
    h = house()
    text = h.tokenizer.token_text
    exchange = h.exchange(EXPLAINING | {"stop": text(67), "stream": False})
    await exchange.until(lambda: h.engine.streams)
    h.engine.streams[0].give(66, 67, 68)
    await exchange.finish()
    (choice,) = json.loads(exchange.body)["choices"]
    assert choice["token_ids"] == [66, 67]
    check_explained(choice, text)


async def test_nothing_is_told_unasked(house: Houses) -> None:
    h = house(say(66))
    async with h.client() as client:
        answer = (await client.post("/generate", json={"prompt": [65], "stream": False})).json()
    assert "explain" not in answer["choices"][0]
    assert h.engine.requests[0].explain is None
    assert h.engine.requests[0].sampling.logprobs is None


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"explain_heads": [[0, 0]]}, "explain_heads", "without explain"),
        ({"explain": True, "explain_heads": [[2, 0]]}, "explain_heads", "layer 2; there are 2"),
        ({"explain": True, "explain_heads": [[0, 4]]}, "explain_heads", "head 4; there are 4"),
        ({"explain": True, "explain_heads": [[0, 0]] * 2}, "explain_heads", "1 of them different"),
        ({"explain": True, "explain_heads": [[0, 0]] * 9}, "explain_heads", "at most 8 items"),
        ({"explain": 1}, "explain", "valid boolean"),
        (
            {"explain": True, "n": 16, "max_tokens": 200},
            "explain",
            "are 3200 tokens to explain; the limit is 3199",
        ),
    ],
)
async def test_a_stream_s_wrong_wishes_are_refused(
    house: Houses, body: dict[str, Any], field: str, words: str
) -> None:
    async with house(max_explain_stream_tokens=3199).client() as client:
        response = await client.post("/generate", json={"prompt": [65]} | body)
    problem = check_problem(response, 422)
    assert problem["field"] == field
    assert words in problem["detail"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("field", ["explain", "explain_heads"])
async def test_openai_s_routes_refuse_it_by_name(house: Houses, path: str, field: str) -> None:
    body = {"model": "case", "prompt": "a", "messages": [], field: True}
    async with house().client() as client:
        response = await client.post(path, json=body)
    assert response.status_code == 422
    assert f"{field}: unknown or unsupported field" in response.json()["error"]["message"]
    await asyncio.sleep(0)
