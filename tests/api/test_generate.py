"""POST /generate, from the request to the last event."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.client import EngineUnavailableError
from tests.api.fake_engine import CONTEXT_LENGTH, FakeStream, say
from tests.api.sse_parser import Event

Houses = Callable[..., Any]


def ids_of(house: Any, text: str) -> list[int]:
    ids: list[int] = house.tokenizer.encode(text)
    return ids


def of_type(events: list[Event], kind: str, index: int | None = None) -> list[Any]:
    bodies = [event.json for event in events if event.type == kind]
    return bodies if index is None else [body for body in bodies if body["index"] == index]


def check_stream(events: list[Event], request_id: str) -> None:
    """What api.md says about every stream that ends well."""
    assert [event.id for event in events] == [f"{request_id}:{n}" for n in range(len(events))]
    assert events[0].type == "start"
    for done in of_type(events, "done"):
        tokens = of_type(events, "token", done["index"])
        assert "".join(token["text"] for token in tokens) == done["text"]
        count = sum(len(token["token_ids"]) for token in tokens)
        assert done["usage"]["completion_tokens"] == count


async def test_a_stream(house: Houses) -> None:
    h = house()
    ids = ids_of(h, " there was a case")
    h.engine.script = say(*ids)
    body = {"prompt": "Once upon a time", "seed": 7, "max_tokens": 50}
    exchange = h.exchange(body, headers={"x-request-id": "my-id"})
    events = await exchange.finish()
    check_stream(events, "my-id")
    start = events[0].json
    assert abs(start.pop("created") - time.time()) < 5
    prompt_tokens = len(ids_of(h, "Once upon a time"))
    assert start == {"id": "my-id", "model": "case", "prompt_tokens": prompt_tokens, "seed": 7}
    assert exchange.headers["x-request-id"] == "my-id"
    assert [token["token_ids"] for token in of_type(events, "token")] == [[i] for i in ids]
    assert "logprobs" not in of_type(events, "token")[0]
    done = events[-1].json
    timing = done.pop("timing")
    assert done == {
        "index": 0,
        "finish_reason": "length",
        "text": " there was a case",
        "usage": {
            "prompt_tokens": prompt_tokens,
            "cached_prompt_tokens": 1,
            "completion_tokens": len(ids),
        },
    }
    assert timing["queue_s"] == 0.25
    assert timing["prefill_s"] == 0.125
    assert timing["time_to_first_token_s"] > 0
    assert timing["decode_s"] > 0
    assert timing["tokens_per_s"] > 0
    h.check_balance()
    assert h.counts()["requests_finished_total:length"] == 1


async def test_one_answer(house: Houses) -> None:
    h = house()
    ids = ids_of(h, " there was")
    h.engine.script = say(*ids)
    body = {"prompt": "Once", "stream": False, "logprobs": 1, "n": 2, "seed": 2**63 - 1}
    async with h.client() as client:
        response = await client.post("/generate", json=body, headers={"x-request-id": "q"})
    assert response.status_code == 200
    answer = response.json()
    assert (answer["id"], answer["model"], answer["seed"]) == ("q", "case", 2**63 - 1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        assert choice["text"] == " there was"
        assert choice["token_ids"] == ids
        assert choice["finish_reason"] == "length"
        assert "stop_reason" not in choice
        assert [entry["token_id"] for entry in choice["logprobs"]] == ids
        first = choice["logprobs"][0]
        assert first["text"] == h.tokenizer.token_text(ids[0])
        assert first["rank"] == 1
        assert first["top"] == [{"token_id": 0, "text": "<|endoftext|>", "logprob": -1.0}]
    assert answer["usage"]["completion_tokens"] == 2 * len(ids)
    assert answer["usage"]["prompt_tokens"] == len(ids_of(h, "Once"))
    # Seeds go around: the second continuation's follows the largest.
    assert [request.sampling.seed for request in h.engine.requests] == [2**63 - 1, 0]
    h.check_balance()


async def test_every_field_reaches_the_engine(house: Houses) -> None:
    h = house(say())
    body = {
        "prompt": [5, 6, 7],
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "logit_bias": {"3": -100, "4": 1.5},
        "seed": 11,
        "stop_token_ids": [8, 8, 9],
        "ignore_eos": True,
        "logprobs": 0,
        "priority": -3,
    }
    await h.exchange(body).finish()
    [request] = h.engine.requests
    assert request.prompt_token_ids == [5, 6, 7]
    assert request.priority == -3
    sampling = request.sampling
    for name in set(body) - {"prompt", "logit_bias", "stop_token_ids", "priority"}:
        assert getattr(sampling, name) == body[name], name
    assert sampling.logit_bias == {3: -100, 4: 1.5}
    assert sampling.stop_token_ids == (8, 9)


async def test_the_server_draws_a_seed_and_says_it(house: Houses) -> None:
    h = house(say())
    seeds = []
    for seed in ({}, {"seed": None}):
        events = await h.exchange({"prompt": "a", **seed}).finish()
        seeds.append(events[0].json["seed"])
        assert h.engine.requests[-1].sampling.seed == seeds[-1]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_a_stop_string_ends_it_and_cancels_the_engine(house: Houses) -> None:
    h = house()
    ids = ids_of(h, " there was a little case")
    h.engine.script = say(*ids)
    events = await h.exchange({"prompt": "Once", "stop": ["e case", " litt"]}).finish()
    check_stream(events, events[0].json["id"])
    done = events[-1].json
    assert done["text"] == " there was a"
    assert (done["finish_reason"], done["stop_reason"]) == ("stop", " litt")
    assert h.engine.streams[0].cancelled
    assert h.counts()["requests_finished_total:stop"] == 1


async def test_tokens_after_a_stop_in_the_same_output_do_not_count(house: Houses) -> None:
    h = house()
    ids = ids_of(h, "a b") + ids_of(h, "c") + ids_of(h, "xyz")
    before = len(ids_of(h, "a b")) + 1
    h.engine.script = lambda stream: stream.give(*ids, finish="length")
    for stream in (True, False):
        body = {"prompt": "a", "stop": "c", "logprobs": 0, "stream": stream}
        if stream:
            events = await h.exchange(body).finish()
            check_stream(events, events[0].json["id"])
            [token] = of_type(events, "token")
        else:
            async with h.client() as client:
                [token] = (await client.post("/generate", json=body)).json()["choices"]
        assert token["text"] == "a b"
        assert token["token_ids"] == ids[:before]
        assert len(token["logprobs"]) == before


async def test_text_held_for_a_stop_is_sent_at_the_end(house: Houses) -> None:
    h = house()
    ids = ids_of(h, "abc")
    h.engine.script = say(*ids)
    events = await h.exchange({"prompt": "a", "stop": "abcd"}).finish()
    check_stream(events, events[0].json["id"])
    texts = [token["text"] for token in of_type(events, "token")]
    assert texts[:-1] == [""] * (len(texts) - 1)
    assert texts[-1] == "abc"
    assert events[-1].json["finish_reason"] == "length"


@pytest.mark.parametrize(("asked", "reason"), [([7], 7), ([], None)])
async def test_a_token_that_stops_has_no_text(
    house: Houses, asked: list[int], reason: int | None
) -> None:
    """Neither one of `stop_token_ids`, which is the stop_reason, nor the end of text."""
    h = house(lambda s: s.give(65, 7, finish="stop", stop_token_id=7))
    events = await h.exchange({"prompt": "a", "stop_token_ids": asked}).finish()
    check_stream(events, events[0].json["id"])
    done = events[-1].json
    assert done["text"] == h.tokenizer.decode([65])
    assert done["finish_reason"] == "stop"
    assert done.get("stop_reason") == reason
    assert of_type(events, "token")[0]["token_ids"] == [65, 7]


async def test_incomplete_characters_wait_and_end_as_replacement(house: Houses) -> None:
    h = house()
    euro = [
        next(i for i in range(300) if h.tokenizer.token_bytes(i) == bytes([b]))
        for b in "€".encode()
    ]
    h.engine.script = say(*euro, *euro[:2])
    events = await h.exchange({"prompt": "a"}).finish()
    check_stream(events, events[0].json["id"])
    texts = [token["text"] for token in of_type(events, "token")]
    assert texts == ["", "", "€", "", "", "\ufffd"]


@pytest.mark.parametrize("prompt", ["Once upon \U0001f600", None])
async def test_echo(house: Houses, prompt: str | None) -> None:
    h = house()
    ids = ids_of(h, "Once upon \U0001f600")
    h.engine.script = say(*ids_of(h, " a time"))
    # The echoed prompt is no output: it stops nothing.
    body = {"prompt": prompt or ids, "echo": True, "stop": "Once", "n": 2}
    events = await h.exchange(body).finish()
    check_stream(events, events[0].json["id"])
    for done in of_type(events, "done"):
        assert done["text"] == "Once upon \U0001f600 a time"


async def test_echo_without_any_token(house: Houses) -> None:
    h = house(say())
    events = await h.exchange({"prompt": "Once", "echo": True}).finish()
    check_stream(events, events[0].json["id"])
    assert events[-1].json["text"] == "Once"


async def test_several_continuations_in_one_stream(house: Houses) -> None:
    h = house()
    exchange = h.exchange({"prompt": "a", "n": 3, "seed": 1})
    await exchange.until(lambda: len(h.engine.streams) == 3)
    first, second, third = h.engine.streams
    second.give(65)
    await exchange.until(lambda: of_type(exchange.events, "token", 1))
    third.give(66, finish="length")
    await exchange.until(lambda: of_type(exchange.events, "done", 2))
    first.give(67, finish="stop")
    second.give(68, finish="length")
    events = await exchange.finish()
    check_stream(events, events[0].json["id"])
    texts = {done["index"]: done["text"] for done in of_type(events, "done")}
    decode = h.tokenizer.decode
    assert texts == {0: decode([67]), 1: decode([65, 68]), 2: decode([66])}
    assert [r.sampling.seed for r in h.engine.requests] == [1, 2, 3]
    assert h.counts()["requests_finished_total:length"] == 1  # one request
    h.check_balance()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(data=st.data())
async def test_any_outputs_make_a_right_stream(house: Houses, data: st.DataObject) -> None:
    """However the tokens come together, with stops or without: law 9."""
    n = data.draw(st.integers(1, 3))
    ids = st.lists(st.integers(0, 299), max_size=12)
    scripts = [data.draw(ids) for _ in range(n)]
    cuts = [data.draw(st.lists(st.integers(1, 4), max_size=6)) for _ in range(n)]
    stops = data.draw(st.lists(st.sampled_from(["e", " a", "he", "\ufffd", "on"]), max_size=2))
    h = house()

    async def run(stream: FakeStream, index: int) -> None:
        at = 0
        for size in cuts[index]:
            stream.give(*scripts[index][at : at + size])
            at += size
            await asyncio.sleep(0)
        stream.give(*scripts[index][at:], finish="length")

    exchange = h.exchange({"prompt": "a", "n": n, "stop": stops})
    await exchange.until(lambda: len(h.engine.streams) == n)
    await asyncio.gather(*(run(s, i) for i, s in enumerate(h.engine.streams)))
    events = await exchange.finish()
    check_stream(events, events[0].json["id"])
    for done in of_type(events, "done"):
        whole = h.tokenizer.decode(scripts[done["index"]])
        assert whole.startswith(done["text"])
        assert not any(stop in done["text"] for stop in stops)
        assert (done["text"] == whole) == ("stop_reason" not in done)
    h.check_balance()


async def test_a_slow_client_gets_tokens_together(house: Houses) -> None:
    h = house()
    exchange = h.exchange({"prompt": "a"})
    await exchange.until(lambda: h.engine.streams and exchange.events)
    exchange.may_send.clear()
    [stream] = h.engine.streams
    for token_id in range(50, 80):
        stream.give(token_id)
        await asyncio.sleep(0)
    stream.give(finish="length")
    exchange.may_send.set()
    events = await exchange.finish()
    check_stream(events, events[0].json["id"])
    assert len(of_type(events, "token")) <= 3
    assert sum(len(token["token_ids"]) for token in of_type(events, "token")) == 30


async def test_the_deadline_ends_it_with_what_it_has(house: Houses) -> None:
    for stream in (True, False):
        h = house()
        exchange = h.exchange(
            {"prompt": "a", "timeout_s": 0.1, "n": 2, "stop": "zz", "stream": stream}
        )
        await asyncio.sleep(0.01)
        first, second = h.engine.streams[-2:]
        first.give(*ids_of(h, "a z"))
        await exchange.finish()
        if stream:
            check_stream(exchange.events, exchange.events[0].json["id"])
            ends = of_type(exchange.events, "done")
        else:
            ends = exchange_json(exchange)["choices"]
        assert [end["finish_reason"] for end in ends] == ["timeout", "timeout"]
        assert [end["text"] for end in ends] == ["a z", ""]
        assert first.cancelled
        assert second.cancelled
        h.check_balance()
        assert h.counts()["requests_finished_total:timeout"] == 1


async def test_what_never_began_waited_all_its_time(house: Houses) -> None:
    h = house()
    exchange = h.exchange({"prompt": "a", "timeout_s": 0.2})
    [done] = of_type(await exchange.finish(), "done", 0)
    assert 0.2 <= done["timing"]["queue_s"] < 5
    assert done["timing"]["time_to_first_token_s"] is None


@pytest.mark.parametrize("n", [1, 2])
async def test_the_deadline_ends_it_though_the_client_does_not_read(house: Houses, n: int) -> None:
    """It ends at once, and with every token that had come, sent or not."""
    h = house()
    exchange = h.exchange({"prompt": "a", "timeout_s": 0.2, "n": n})
    await exchange.until_events(1)
    exchange.may_send.clear()
    for token_id in range(50, 80):
        for stream in h.engine.streams:
            stream.give(token_id)
        await asyncio.sleep(0.001)
    await exchange.until(lambda: all(stream.cancelled for stream in h.engine.streams))
    assert h.counts()["requests_finished_total:timeout"] == 1
    assert len(h.context.generations) == 0
    exchange.may_send.set()
    events = await exchange.finish()
    check_stream(events, events[0].json["id"])
    for index in range(n):
        tokens = of_type(events, "token", index)
        assert [i for token in tokens for i in token["token_ids"]] == [*range(50, 80)]
        [done] = of_type(events, "done", index)
        assert done["finish_reason"] == "timeout"
        assert done["text"] == h.tokenizer.decode([*range(50, 80)])
    h.check_balance()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_goes_away_cancels(house: Houses, stream: bool, n: int) -> None:
    h = house()
    exchange = h.exchange({"prompt": "a", "n": n, "stream": stream})
    await exchange.until(lambda: len(h.engine.streams) == n)
    h.engine.streams[0].give(65)
    await asyncio.sleep(0.01)
    exchange.disconnect()
    await exchange.finish()
    assert all(stream.cancelled for stream in h.engine.streams)
    assert h.counts()["requests_aborted_total"] == 1
    assert len(h.context.generations) == 0
    h.check_balance()


async def test_a_client_that_stopped_reading_and_goes_away_cancels(house: Houses) -> None:
    h = house()
    exchange = h.exchange({"prompt": "a"})
    await exchange.until(lambda: h.engine.streams)
    exchange.may_send.clear()
    h.engine.streams[0].give(65)
    await exchange.until(lambda: exchange.sends_waiting == 1)
    exchange.disconnect()
    await exchange.finish()
    assert h.engine.streams[0].cancelled
    assert h.counts()["requests_aborted_total"] == 1
    h.check_balance()


async def test_what_the_client_of_the_engine_ends_as_cancelled_is_told_so(house: Houses) -> None:
    h = house()
    streamed = h.exchange({"prompt": "a", "n": 2})
    whole = h.exchange({"prompt": "a", "stream": False})
    await streamed.until(lambda: len(h.engine.streams) == 3 and len(h.context.generations) == 2)
    for stream in h.engine.streams:
        stream.give(finish="cancelled")
    events = await streamed.finish()
    check_stream(events, events[0].json["id"])
    assert {done["finish_reason"] for done in of_type(events, "done")} == {"cancelled"}
    await whole.finish()
    assert exchange_json(whole)["choices"][0]["finish_reason"] == "cancelled"
    h.check_balance()


def exchange_json(exchange: Any) -> Any:
    return json.loads(exchange.body)


async def test_an_error_of_one_sequence_ends_the_stream(house: Houses) -> None:
    h = house()
    exchange = h.exchange({"prompt": "a", "n": 2})
    await exchange.until(lambda: len(h.engine.streams) == 2)
    h.engine.streams[1].give(65)
    await exchange.until(lambda: of_type(exchange.events, "token"))
    h.engine.streams[1].give(finish="error", error="/secret/path.py:12 blew up")
    events = await exchange.finish()
    assert [done["finish_reason"] for done in of_type(events, "done")] == ["error", "cancelled"]
    problem = events[-1].json
    assert events[-1].type == "error"
    assert problem["status"] == 500
    assert problem["instance"] == events[0].json["id"]
    assert b"secret" not in exchange.body
    assert h.engine.streams[0].cancelled
    assert h.counts()["requests_failed_total"] == 1
    h.check_balance()


@pytest.mark.parametrize(
    ("error", "status"),
    [(EngineUnavailableError("the engine is being replaced", 3), 503), (RuntimeError("x"), 500)],
)
async def test_the_engine_fails_in_the_middle(house: Houses, error: Exception, status: int) -> None:
    h = house()
    for n in (1, 2):
        exchange = h.exchange({"prompt": "a", "n": n})
        await exchange.until(lambda: exchange.events)  # noqa: B023
        h.engine.streams[-1].fail(error)
        events = await exchange.finish()
        assert [done["finish_reason"] for done in of_type(events, "done")] == ["error"] * n
        assert events[-1].type == "error"
        assert events[-1].json["status"] == status
        h.check_balance()
    h.engine.script = lambda stream: stream.fail(error)
    async with h.client() as client:
        response = await client.post("/generate", json={"prompt": "a", "stream": False})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert h.counts()["requests_failed_total"] == 3
    h.check_balance()


async def test_the_default_max_tokens_is_what_fits(house: Houses) -> None:
    h = house(say())
    for length, expected in ((10, 128), (CONTEXT_LENGTH - 5, 5)):
        events = await h.exchange({"prompt": [65] * length}).finish()
        assert events[-1].type == "done"
        assert h.engine.requests[-1].sampling.max_tokens == expected


async def test_a_long_prompt_is_tokenized_off_the_event_loop(
    house: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = house(say(), tokenize_in_thread_chars=10)
    calls: list[Any] = []
    to_thread = asyncio.to_thread

    async def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return await to_thread(*args, **kwargs)

    monkeypatch.setattr(asyncio, "to_thread", spy)
    await h.exchange({"prompt": "a" * 10}).finish()
    assert not calls
    await h.exchange({"prompt": "a" * 11}).finish()
    assert len(calls) == 1
