"""The OpenAI routes on a scripted engine: shapes, refusals, failures, and who goes away when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.chat_template import ChatTemplateError
from service.api.keys import ApiKey, api_key_hash
from service.api.openai_schemas import ChatRequest, CompletionRequest
from service.chat_renderer import ChatBusyError
from service.client import EngineUnavailableError, NeverFitsError, QueueFullError
from tests.api.fake_engine import CONTEXT_LENGTH, VOCAB_SIZE, FakeStream, say

Houses = Callable[..., Any]

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
ASK = {"model": "case", "prompt": "Once"}
TALK: dict[str, Any] = {"model": "case", "messages": [{"role": "user", "content": "Once"}]}
WISHES = {COMPLETIONS: ASK, CHAT: TALK}


class Renderer:
    """In the place of the one with a process."""

    def __init__(self) -> None:
        self.talks: list[Any] = []
        self.failure: Exception | None = None

    async def render(self, messages: list[dict[str, str]]) -> str:
        self.talks.append(messages)
        if self.failure is not None:
            raise self.failure
        return "".join(f"<|endoftext|>{m['role']}: {m['content']}" for m in messages)


def ids_of(house: Any, text: str) -> list[int]:
    ids: list[int] = house.tokenizer.encode(text)
    return ids


def chunks_of(exchange: Any) -> list[Any]:
    """The chunks of a stream that ended well."""
    assert exchange.events[-1].data == "[DONE]"
    assert {event.type for event in exchange.events} == {"message"}
    return [event.json for event in exchange.events[:-1]]


async def test_the_bytes_of_a_completion(house: Houses) -> None:
    h = house()
    h.engine.script = say(*ids_of(h, " there was"))
    async with h.client() as client:
        response = await client.post(COMPLETIONS, json=ASK, headers={"x-request-id": "q"})
    answer = response.json()
    assert response.headers["content-type"] == "application/json"
    num_tokens, num_prompt = len(ids_of(h, " there was")), len(ids_of(h, "Once"))
    assert answer.pop("created") > 1e9
    assert answer.pop("system_fingerprint").startswith("fp_")
    assert answer == {
        "id": "cmpl-q",
        "object": "text_completion",
        "model": "case",
        "choices": [
            {"index": 0, "text": " there was", "logprobs": None, "finish_reason": "length"}
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }
    h.check_balance()


async def test_the_chunks_of_a_completion(house: Houses) -> None:
    h = house()
    ids = ids_of(h, " there was")
    h.engine.script = say(*ids, finish="stop")
    body = ASK | {"stream": True, "stream_options": {"include_usage": True}}
    exchange = h.exchange(body, path=COMPLETIONS)
    await exchange.finish()
    *texts, end, usage = chunks_of(exchange)
    assert [one["choices"] for one in texts] == [
        [
            {
                "index": 0,
                "text": h.tokenizer.token_text(token_id),
                "logprobs": None,
                "finish_reason": None,
            }
        ]
        for token_id in ids
    ]
    assert end["choices"][0] == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert [one["usage"] for one in (*texts, end)] == [None] * (len(texts) + 1)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(ids)
    assert {one["object"] for one in (*texts, end, usage)} == {"text_completion"}
    h.check_balance()


async def test_the_chunks_of_a_chat(house: Houses) -> None:
    h = house(chat_renderer=Renderer())
    ids = ids_of(h, " there was")
    h.engine.script = say(*ids)
    exchange = h.exchange(TALK | {"stream": True, "n": 2}, path=CHAT)
    await exchange.finish()
    chunks = chunks_of(exchange)
    assert all("usage" not in chunk for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index in (0, 1):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [one["delta"] for one in mine[1:-1]] == [
            {"content": h.tokenizer.token_text(token_id)} for token_id in ids
        ]
        assert mine[-1]["delta"] == {}
        assert [one["finish_reason"] for one in mine] == [None] * (len(ids) + 1) + ["length"]


async def test_a_rendering_is_tokenized_as_it_is(house: Houses) -> None:
    """The template writes the special tokens; the tokenizer reads them and adds none."""
    renderer = Renderer()
    h = house(say(), chat_renderer=renderer)
    talk = TALK | {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": t} for t in "ab"]},
            {"role": "user", "content": "Once", "name": "Ann"},
        ]
    }
    await h.exchange(talk, path=CHAT).finish()
    assert renderer.talks == [
        [
            {"role": "system", "content": "a\nb"},
            {"role": "user", "content": "Once", "name": "Ann"},
        ]
    ]
    [request] = h.engine.requests
    assert request.prompt_token_ids == [0, *ids_of(h, "system: a\nb"), 0, *ids_of(h, "user: Once")]


@pytest.mark.parametrize("path", WISHES)
async def test_every_field_reaches_the_engine(house: Houses, path: str) -> None:
    h = house(say(), chat_renderer=Renderer())
    body = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "seed": 11,
        "ignore_eos": True,
    }
    rest: dict[str, Any] = {
        "logit_bias": {"3": -100, "4": 1.5},
        "stop_token_ids": [8, 9],
        "stop": ["x"],
        "priority": -3,
        "timeout_s": 5,
        "user": "me",
    }
    await h.exchange(WISHES[path] | body | rest, path=path).finish()
    [request] = h.engine.requests
    for name, value in body.items():
        assert getattr(request.sampling, name) == value, name
    assert request.sampling.logit_bias == {3: -100, 4: 1.5}
    assert request.sampling.stop_token_ids == (8, 9)
    assert request.sampling.logprobs is None
    assert request.priority == -3


@pytest.mark.parametrize("path", WISHES)
async def test_null_is_a_default(house: Houses, path: str) -> None:
    h = house(say(), chat_renderer=Renderer())
    fields = ["temperature", "top_p", "n", "stop", "seed", "logit_bias", "max_tokens", "stream"]
    fields += ["stream_options", "presence_penalty", "logprobs", "user"]
    fields += ["suffix", "best_of", "echo"] if path == COMPLETIONS else ["tools", "top_logprobs"]
    exchange = h.exchange(WISHES[path] | dict.fromkeys(fields), path=path)
    await exchange.finish()
    assert exchange.status == 200
    [request] = h.engine.requests
    assert request.sampling.temperature == 1.0
    room = CONTEXT_LENGTH - len(request.prompt_token_ids)
    assert request.sampling.max_tokens == (16 if path == COMPLETIONS else room)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 5]}, "prompt"),
    (COMPLETIONS, {"prompt": [[1], []]}, "prompt"),
    (COMPLETIONS, {"prompt": [[1], [VOCAB_SIZE]]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt"),
    (COMPLETIONS, {"prompt": {}}, "prompt"),
    (COMPLETIONS, {"logprobs": 6}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"echo": True, "logprobs": 1}, "echo"),
    (COMPLETIONS, {"messages": []}, "messages"),
    (COMPLETIONS, {"unheard_of": None}, "unheard_of"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"stream": True, "stream_options": {"usage": True}}, "stream_options"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}] * 2049}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages",
    ),
    (CHAT, {"messages": [{"role": "assistant", "content": "a", "tool_calls": []}]}, "messages"),
    (CHAT, {"logprobs": 1}, "logprobs"),
    (CHAT, {"top_logprobs": 1}, "top_logprobs"),
    (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
    (CHAT, {"max_completion_tokens": CONTEXT_LENGTH}, "max_completion_tokens"),
    (CHAT, {"max_tokens": CONTEXT_LENGTH}, "max_tokens"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
    (CHAT, {"response_format": {"type": "text", "json_schema": {}}}, "response_format"),
    (CHAT, {"store": True}, "store"),
    (CHAT, {"prompt": "a"}, "prompt"),
    *[
        (CHAT, {field: value}, field)
        for field, value in {
            "tools": [],
            "tool_choice": "none",
            "functions": [],
            "function_call": "none",
            "parallel_tool_calls": True,
            "audio": {},
            "modalities": ["text"],
            "metadata": {},
            "prediction": {},
            "reasoning_effort": "low",
            "service_tier": "auto",
            "verbosity": "low",
            "web_search_options": {},
        }.items()
    ],
]


@pytest.mark.parametrize(
    ("path", "fields", "param"), REFUSED, ids=[f"{r[0]}-{str(r[1])[:40]}" for r in REFUSED]
)
async def test_what_is_not_taken_is_refused_by_name(
    house: Houses, path: str, fields: dict[str, Any], param: str
) -> None:
    h = house(chat_renderer=Renderer())
    exchange = h.exchange(WISHES[path] | fields, path=path)
    await exchange.finish()
    assert exchange.status == 422
    assert exchange.headers["content-type"] == "application/json"
    [(name, error)] = json.loads(exchange.body).items()
    assert name == "error"
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert error["type"] == "invalid_request_error"
    assert h.engine.streams == []


async def test_an_unsupported_field_is_not_called_unknown(house: Houses) -> None:
    exchange = house().exchange(TALK | {"tools": [{}]}, path=CHAT)
    await exchange.finish()
    message = json.loads(exchange.body)["error"]["message"]
    assert message == "tools: this field is not supported, got a list of 1"


async def test_best_of_may_say_what_n_says(house: Houses) -> None:
    exchange = house(say()).exchange(ASK | {"n": 2, "best_of": 2}, path=COMPLETIONS)
    await exchange.finish()
    assert exchange.status == 200


@pytest.mark.parametrize(
    ("refusal", "kind", "code", "retry_after"),
    [
        (QueueFullError("full", 2.5), openai.RateLimitError, "rate_limit_exceeded", "3"),
        (EngineUnavailableError("no", 1.0), openai.InternalServerError, "unavailable", "1"),
        (
            NeverFitsError("9 of 8", "max_tokens"),
            openai.UnprocessableEntityError,
            "context_length_exceeded",
            None,
        ),
    ],
)
async def test_a_refusal_of_the_engine_is_the_clients_exception(
    house: Houses,
    refusal: Exception,
    kind: type[openai.APIStatusError],
    code: str,
    retry_after: str | None,
) -> None:
    h = house(chat_renderer=Renderer())
    h.engine.refuse = refusal
    async with h.openai() as client:
        for stream in (False, True):
            with pytest.raises(kind) as caught:
                await client.completions.create(model="case", prompt="a", stream=stream)
            assert caught.value.code == code
            assert caught.value.response.headers.get("retry-after") == retry_after
            assert caught.value.request_id
        with pytest.raises(kind):
            await client.chat.completions.create(**TALK)
    h.check_balance()


async def test_a_missing_key_is_the_clients_exception(house: Houses) -> None:
    h = house(say(), api_keys=(ApiKey("right", api_key_hash("right")),))
    async with h.openai("wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.models.list()
        assert caught.value.code == "invalid_api_key"
    async with h.openai("right") as client:
        assert (await client.completions.create(**ASK)).choices[0].finish_reason == "length"


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/embeddings"])
async def test_there_is_no_such_route(house: Houses, path: str) -> None:
    async with house().client() as client:
        response = await client.post(path, json={})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", WISHES)
async def test_another_model_is_not_found(house: Houses, path: str) -> None:
    h = house(chat_renderer=Renderer())
    exchange = h.exchange(WISHES[path] | {"model": "gpt-9"}, path=path)
    await exchange.finish()
    assert exchange.status == 404
    error = json.loads(exchange.body)["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'gpt-9'" in error["message"]
    assert "'case'" in error["message"]
    assert h.counts()["requests_rejected_total:model-not-found"] == 1


async def test_no_template_a_broken_one_and_no_turn(house: Houses) -> None:
    renderer = Renderer()
    for made, failure, status, words in (
        (None, None, 422, "--chat-template"),
        (renderer, ChatTemplateError("roles must alternate"), 422, "roles must alternate"),
        (renderer, ChatBusyError("no turn"), 503, "no turn"),
    ):
        renderer.failure = failure
        exchange = house(chat_renderer=made).exchange(TALK, path=CHAT)
        await exchange.finish()
        assert exchange.status == status
        assert words in json.loads(exchange.body)["error"]["message"]
        assert ("retry-after" in exchange.headers) == (status == 503)


def break_after_one(stream: FakeStream) -> None:
    stream.give(5)

    async def run() -> None:
        await stream.taken.wait()
        stream.fail(RuntimeError("/secret/path broke"))

    stream.task = asyncio.create_task(run())  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", WISHES)
async def test_an_error_in_mid_stream_is_the_last_word(house: Houses, path: str) -> None:
    h = house(break_after_one, chat_renderer=Renderer())
    exchange = h.exchange(WISHES[path] | {"stream": True}, path=path)
    events = await exchange.finish()
    error = events[-1].json["error"]
    assert error["type"] == "server_error"
    assert b"secret" not in exchange.body
    assert b"DONE" not in exchange.body
    assert h.counts()["requests_failed_total"] == 1
    h.check_balance()


async def test_the_client_raises_what_comes_in_mid_stream(house: Houses) -> None:
    h = house(break_after_one)
    async with h.openai() as client:
        stream = await client.completions.create(model="case", prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="the server failed"):
            [chunk async for chunk in stream]


async def test_an_error_without_a_stream(house: Houses) -> None:
    h = house(break_after_one)
    async with h.openai() as client:
        with pytest.raises(openai.InternalServerError):
            await client.completions.create(model="case", prompt="a")
    h.check_balance()


@pytest.mark.parametrize("path", WISHES)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_time_limit_is_a_length_that_says_so(
    house: Houses, path: str, stream: bool
) -> None:
    h = house(lambda one: one.give(5), chat_renderer=Renderer())
    exchange = h.exchange(WISHES[path] | {"stream": stream, "timeout_s": 0.05}, path=path)
    await exchange.finish()
    last = chunks_of(exchange)[-1] if stream else json.loads(exchange.body)
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["choices"][0]["cut_short_by"] == "timeout"
    assert h.counts()["requests_finished_total:timeout"] == 1


@pytest.mark.parametrize("path", WISHES)
async def test_a_silent_model_is_kept_alive_and_a_client_that_goes_away_cancels(
    house: Houses, path: str
) -> None:
    h = house(chat_renderer=Renderer(), keep_alive_s=0.01)
    exchange = h.exchange(WISHES[path] | {"stream": True, "n": 2}, path=path)
    await exchange.until(lambda: len(exchange.comments) >= 2)
    assert exchange.headers["content-type"].startswith("text/event-stream")
    exchange.disconnect()
    await exchange.finish()
    assert [stream.cancelled for stream in h.engine.streams] == [True, True]
    assert h.counts()["requests_aborted_total"] == 1
    h.check_balance()


async def test_who_waits_for_a_whole_answer_and_goes_away_cancels(house: Houses) -> None:
    h = house()
    exchange = h.exchange(ASK | {"prompt": ["a", "b"]}, path=COMPLETIONS)
    await exchange.until(lambda: len(h.engine.streams) == 2)
    exchange.disconnect()
    await exchange.finish()
    assert all(stream.cancelled for stream in h.engine.streams)
    assert h.counts()["requests_aborted_total"] == 1
    h.check_balance()


async def test_prompts_of_one_request_are_one_request(house: Houses) -> None:
    h = house(say(5, 6))
    body = ASK | {"prompt": ["a", "Once upon", "b"], "n": 2, "seed": 7}
    exchange = h.exchange(body, path=COMPLETIONS)
    await exchange.finish()
    answer = json.loads(exchange.body)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    requests = h.engine.requests
    expected = [ids_of(h, text) for text in ("a", "a", "Once upon", "Once upon", "b", "b")]
    assert [request.prompt_token_ids for request in requests] == expected
    assert [request.sampling.seed for request in requests] == [7, 8] * 3
    num_prompt = sum(len(ids) for ids in expected[::2])
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    counts = h.counts()
    assert counts["requests_accepted_total"] == counts["requests_finished_total:length"] == 1
    assert counts["prompt_tokens_total"] == num_prompt


async def test_offsets_and_names_of_tokens_that_are_parts_of_characters(house: Houses) -> None:
    h = house()
    ids = ids_of(h, "On\U0001f601!")  # an emoji that is not in the vocabulary
    parts = [one for one in ids if "\ufffd" in h.tokenizer.token_text(one)]
    assert len(parts) > 1
    h.engine.script = say(*ids)
    body = ASK | {"logprobs": 1, "prompt": "Once"}
    exchange = h.exchange(body, path=COMPLETIONS)
    await exchange.finish()
    choice = json.loads(exchange.body)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == "On\U0001f601!"
    assert len(found["tokens"]) == len(found["text_offset"]) == len(ids)
    place = choice["text"].index("\U0001f601")
    for token_id, name, offset in zip(ids, found["tokens"], found["text_offset"], strict=True):
        if token_id in parts:
            assert name.startswith("bytes:\\x")
            assert offset == place
        else:
            assert choice["text"][offset:].startswith(name)
    # What was chosen is among the likeliest, even if it is none of them.
    assert [len(top) for top in found["top_logprobs"]] == [2] * len(ids)


async def test_the_bytes_of_a_chats_logprobs(house: Houses) -> None:
    h = house(chat_renderer=Renderer())
    ids = ids_of(h, "é\U0001f601")
    h.engine.script = say(*ids)
    body = TALK | {"logprobs": True, "top_logprobs": 1, "stream": True}
    exchange = h.exchange(body, path=CHAT)
    await exchange.finish()
    found = [
        one
        for chunk in chunks_of(exchange)
        for choice in chunk["choices"]
        if choice["logprobs"]
        for one in choice["logprobs"]["content"]
    ]
    assert bytes(byte for one in found for byte in one["bytes"]).decode() == "é\U0001f601"
    assert found[0]["top_logprobs"] == [
        {"token": "<|endoftext|>", "logprob": -1.0, "bytes": list(b"<|endoftext|>")}
    ]


async def test_the_fingerprint_is_that_of_the_model_and_its_settings(house: Houses) -> None:
    h = house(say())

    async def fingerprint() -> str:
        async with h.client() as client:
            answer = (await client.post(COMPLETIONS, json=ASK)).json()
        found: str = answer["system_fingerprint"]
        return found

    first = await fingerprint()
    assert await fingerprint() == first
    h.engine.info = msgspec.structs.replace(h.engine.info, dtype="bfloat16")
    assert await fingerprint() != first


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "audio"]), json_values, max_size=3),
    max_size=3,
)
field_names = st.sampled_from(sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields}))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None
)
@given(
    path=st.sampled_from(sorted(WISHES)),
    body=st.dictionaries(field_names, json_values, max_size=4),
    talk=messages | st.none(),
)
async def test_no_body_is_a_server_error(
    house: Houses, path: str, body: dict[str, Any], talk: Any
) -> None:
    h = house(say(), chat_renderer=Renderer())
    spoken = {"messages": talk} if path == CHAT and talk is not None else {}
    exchange = h.exchange(WISHES[path] | body | spoken, path=path)
    await exchange.finish()
    assert exchange.status in (200, 404, 422), exchange.body
    if exchange.status != 200:
        assert set(json.loads(exchange.body)) == {"error"}


async def test_the_routes_are_described(house: Houses) -> None:
    async with house().client() as client:
        described = (await client.get("/openapi.json")).json()
    chat = described["paths"][CHAT]["post"]
    refused = chat["responses"]["422"]["content"]["application/json"]["schema"]
    assert refused == {"$ref": "#/components/schemas/OpenAIErrorAnswer"}
    fields = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert "Not supported" in json.dumps(fields["tools"])
    assert "label" in json.dumps(fields["user"])
