"""The OpenAI routes of a real server, spoken to by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import openai
import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from tests.grammars.schemas import schemas
from tests.servers import Server, running_server, status
from tests.service.chat_model import make_chat_model, rendered

MODEL = "chatty"
PROMPT = "Once upon a time"
TALK: list[Any] = [
    {"role": "system", "content": "Tell a story."},
    {"role": "user", "content": "About a cat."},
]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("chatty")
    model = make_chat_model(folder)
    with running_server(folder, "--threads", "1", "--model", str(model)) as running:
        yield running


@pytest.fixture
def client(chatty: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{chatty.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(chatty: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{chatty.url}/v1", api_key="none") as client:
        yield client


def native(server: Server, **body: Any) -> dict[str, Any]:
    """The same wish at /generate."""
    return server.generate(body)


def test_the_model_is_listed_and_found_by_its_name(client: openai.OpenAI) -> None:
    [model] = client.models.list()
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_what_generate_says(client: openai.OpenAI, chatty: Server) -> None:
    wish: Any = {
        "prompt": PROMPT,
        "max_tokens": 24,
        "seed": 5,
        "temperature": 0.9,
        "top_p": 0.95,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "n": 2,
    }
    extra: Any = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True}
    answer = client.completions.create(model=MODEL, **wish, extra_body=extra)
    expected = native(chatty, **wish, **extra)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.text for choice in answer.choices] == [
        choice["text"] for choice in expected["choices"]
    ]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected["usage"]["prompt_tokens"]
    assert answer.usage.completion_tokens == 48
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 48


def test_the_default_is_16_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_the_same_seed_gives_the_same_text_and_another_another(client: openai.OpenAI) -> None:
    texts = [
        client.completions.create(model=MODEL, prompt=PROMPT, seed=seed, max_tokens=30)
        for seed in (1, 1, 2)
    ]
    first, again, other = (answer.choices[0].text for answer in texts)
    assert first == again
    assert first != other
    assert len({answer.system_fingerprint for answer in texts}) == 1


def test_a_streamed_completion_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    wish: Any = {"model": MODEL, "prompt": PROMPT, "seed": 3, "max_tokens": 40, "n": 2}
    whole = client.completions.create(**wish)
    chunks = list(
        client.completions.create(**wish, stream=True, stream_options={"include_usage": True})
    )
    assert len(chunks) > 20, "tokens came in a few lumps instead of one by one"
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        assert [one.finish_reason for one in mine if one.finish_reason] == [choice.finish_reason]
        assert mine[-1].finish_reason is not None
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_no_chunk_has_it(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, stream=True)
    chunks = list(stream)
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_each_prompt_of_a_batch_is_answered_as_if_alone(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "The dog", "A little girl named Lily"]
    wish: Any = {"model": MODEL, "seed": 11, "max_tokens": 12, "n": 2}
    batch = client.completions.create(prompt=prompts, **wish)
    alone = [client.completions.create(prompt=prompt, **wish) for prompt in prompts]
    assert [choice.index for choice in batch.choices] == list(range(6))
    expected = [choice.text for answer in alone for choice in answer.choices]
    assert [choice.text for choice in batch.choices] == expected
    assert batch.usage is not None
    usages = [answer.usage for answer in alone]
    assert batch.usage.prompt_tokens == sum(one.prompt_tokens for one in usages if one)
    assert batch.usage.completion_tokens == sum(one.completion_tokens for one in usages if one)


def test_prompts_of_token_ids(client: openai.OpenAI, chatty: Server) -> None:
    def ids(text: str) -> list[int]:
        body = {"text": text}
        found: list[int] = httpx2.post(f"{chatty.url}/tokenize", json=body).json()["token_ids"]
        return found

    wish: Any = {"model": MODEL, "seed": 1, "max_tokens": 8}
    texts = [PROMPT, "The dog"]
    by_text = client.completions.create(prompt=texts, **wish)
    by_ids = client.completions.create(prompt=[ids(text) for text in texts], **wish)
    one = client.completions.create(prompt=ids(PROMPT), **wish)
    assert [c.text for c in by_ids.choices] == [c.text for c in by_text.choices]
    assert one.choices[0].text == by_text.choices[0].text


def test_echo_and_stop(client: openai.OpenAI) -> None:
    wish: Any = {"model": MODEL, "prompt": PROMPT, "seed": 4, "max_tokens": 60}
    plain = client.completions.create(**wish).choices[0].text
    word = plain.split()[3]
    stopped = client.completions.create(**wish, stop=[word], echo=True).choices[0]
    assert stopped.text == PROMPT + plain[: plain.index(word)]
    assert stopped.finish_reason == "stop"
    assert stopped.model_extra is not None
    assert stopped.model_extra["stop_reason"] == word


def test_logprobs_of_a_completion(client: openai.OpenAI, chatty: Server) -> None:
    wish: Any = {"prompt": PROMPT, "seed": 4, "max_tokens": 10, "logprobs": 3}
    choice = client.completions.create(model=MODEL, **wish).choices[0]
    expected = native(chatty, **wish)["choices"][0]["logprobs"]
    found = choice.logprobs
    assert found is not None
    assert found.tokens == [one["text"] for one in expected]
    assert found.token_logprobs == [one["logprob"] for one in expected]
    assert found.text_offset is not None
    assert found.top_logprobs is not None
    for token, offset, top, native_one in zip(
        found.tokens or [], found.text_offset, found.top_logprobs, expected, strict=True
    ):
        assert choice.text[offset : offset + len(token)] == token
        assert len(top) in (3, 4)
        assert top[token] == native_one["logprob"]
        assert max(top.values()) == native_one["top"][0]["logprob"]


def test_streamed_logprobs_add_up_to_the_whole(client: openai.OpenAI) -> None:
    wish: Any = {"model": MODEL, "prompt": PROMPT, "seed": 4, "max_tokens": 10, "logprobs": 1}
    whole = client.completions.create(**wish).choices[0].logprobs
    assert whole is not None
    pieces = [
        choice.logprobs
        for chunk in client.completions.create(**wish, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
    ]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for piece in pieces for one in getattr(piece, name)] == getattr(whole, name)


def test_logit_bias_forces_a_token(client: openai.OpenAI, chatty: Server) -> None:
    body = {"text": " cat"}
    [token] = httpx2.post(f"{chatty.url}/tokenize", json=body).json()["token_ids"]
    answer = client.completions.create(
        model=MODEL, prompt="The", max_tokens=3, logit_bias={str(token): 100}, temperature=0
    )
    assert answer.choices[0].text == " cat cat cat"


def test_a_frequency_penalty_ends_the_repetition(client: openai.OpenAI, chatty: Server) -> None:
    body = {"text": " cat"}
    [token] = httpx2.post(f"{chatty.url}/tokenize", json=body).json()["token_ids"]
    wish: Any = {"model": MODEL, "prompt": "The", "max_tokens": 20, "temperature": 0}
    biased = client.completions.create(**wish, logit_bias={str(token): 30}).choices[0].text
    held = client.completions.create(**wish, logit_bias={str(token): 30}, frequency_penalty=2)
    assert biased == " cat" * 20
    assert held.choices[0].text.count(" cat") < 20


def test_a_chat_is_the_completion_of_its_rendering(client: openai.OpenAI, chatty: Server) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=TALK, seed=9, max_completion_tokens=25, n=2
    )
    talk = [(one["role"], one["content"]) for one in TALK]
    expected = native(chatty, prompt="<|endoftext|>" + rendered(*talk), seed=9, max_tokens=25, n=2)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert [choice.message.content for choice in answer.choices] == [
        choice["text"] for choice in expected["choices"]
    ]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected["usage"]["prompt_tokens"]


def test_a_conversation_goes_on_with_the_clients_own_message(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=TALK, seed=9, max_tokens=10)
    message = first.choices[0].message
    talk = [*TALK, message, {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(model=MODEL, messages=talk, seed=9, max_tokens=10)
    plain = [*TALK, {"role": "assistant", "content": message.content}, talk[-1]]
    same = client.chat.completions.create(model=MODEL, messages=plain, seed=9, max_tokens=10)
    assert second.choices[0].message.content == same.choices[0].message.content
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    # The beginning was computed for the first request; whole blocks of it are found again.
    assert same.usage is not None
    assert same.usage.prompt_tokens_details is not None
    assert (same.usage.prompt_tokens_details.cached_tokens or 0) > 0


def test_a_streamed_chat_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    wish: Any = {"model": MODEL, "messages": TALK, "seed": 9, "max_tokens": 25, "n": 2}
    whole = client.chat.completions.create(**wish)
    chunks = list(
        client.chat.completions.create(**wish, stream=True, stream_options={"include_usage": True})
    )
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert [one.delta.role for one in mine[1:]] == [None] * (len(mine) - 1)
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_the_clients_own_stream_helper_reads_it(client: openai.OpenAI) -> None:
    wish: Any = {"model": MODEL, "messages": TALK, "seed": 9, "stop": "."}
    with client.chat.completions.stream(**wish) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    whole = client.chat.completions.create(**wish)
    assert "content.delta" in kinds
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=TALK, seed=9, max_tokens=8, logprobs=True, top_logprobs=2
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content) == 8
    text = b"".join(bytes(one.bytes or []) for one in found.content).decode()
    assert text == answer.choices[0].message.content
    for one in found.content:
        assert one.logprob <= 0
        assert len(one.top_logprobs) == 2
        assert one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob


def test_parts_and_a_developer_are_read_like_a_text_and_a_system(client: openai.OpenAI) -> None:
    wish: Any = {"model": MODEL, "seed": 2, "max_tokens": 10}
    plain = client.chat.completions.create(
        messages=[
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "A cat.\nA dog."},
        ],
        **wish,
    )
    parts = client.chat.completions.create(
        messages=[
            {"role": "developer", "content": "Be kind."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "A cat."},
                    {"type": "text", "text": "A dog."},
                ],
            },
        ],
        **wish,
    )
    assert parts.choices[0].message == plain.choices[0].message


def test_a_chat_without_a_bound_may_fill_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=TALK, seed=1, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("wish", "param", "code", "words"),
    [
        ({"temperature": 3}, "temperature", None, "less than or equal to 2"),
        ({"prompt": "x", "suffix": "y"}, "suffix", None, "not supported"),
        ({"max_tokens": 9999}, "max_tokens", "context_length_exceeded", "512"),
        ({"prompt": [PROMPT, "a " * 3000]}, "prompt[1]", "context_length_exceeded", "512"),
        ({"extra_body": {"beam_width": 2}}, "beam_width", None, "unknown or unsupported"),
    ],
)
def test_a_wrong_field_of_a_completion_is_told_by_name(
    client: openai.OpenAI, wish: Any, param: str, code: str | None, words: str
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.completions.create(model=MODEL, **{"prompt": PROMPT, **wish})
    error = caught.value
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert error.message
    assert words in str(error)


@pytest.mark.parametrize(
    ("wish", "param", "words"),
    [
        ({"max_tokens": 9999}, "max_tokens", "context length of 512"),
        ({"max_completion_tokens": 9999}, "max_completion_tokens", "context length of 512"),
        ({"messages": [{"role": "user", "content": "a " * 900}]}, "messages", "512"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "speaks first"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
    ],
)
def test_a_wrong_field_of_a_chat_is_told_by_name(
    client: openai.OpenAI, wish: Any, param: str, words: str
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model=MODEL, **{"messages": TALK, **wish})
    assert caught.value.param == param
    assert words in str(caught.value)


@pytest.mark.slow
@given(schema=schemas)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_100_random_schemas_are_kept(client: openai.OpenAI, schema: dict[str, Any]) -> None:
    """Whatever the model would rather say: an answer that ended by itself fits its schema."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=TALK,
        seed=7,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "thing", "schema": schema, "strict": True},
        },
    )
    [choice] = answer.choices
    if choice.finish_reason == "stop":
        jsonschema.validate(json.loads(choice.message.content or ""), schema)


def test_json_through_the_client_streamed_and_whole(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_object"}
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=200, extra_body={"regex": r"[a-z]{3,12}", "seed": 3}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert re.fullmatch(r"[a-z]{3,12}", answer.choices[0].text)
    stream = client.chat.completions.create(
        model=MODEL, messages=TALK, response_format=form, seed=1, stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream]
    text = "".join(chunk.delta.content or "" for chunk in chunks)
    if chunks[-1].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    else:
        assert text.startswith("{")


def test_a_model_without_a_template_says_so(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        with pytest.raises(openai.UnprocessableEntityError, match="no chat template") as caught:
            client.chat.completions.create(model="stories", messages=TALK)
        assert caught.value.code == "no_chat_template"


async def test_32_streams_at_once_each_have_the_text_they_have_alone(
    async_client: openai.AsyncOpenAI,
) -> None:
    async def chat(number: int) -> str:
        stream = await async_client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"Story number {number}."}],
            seed=number,
            max_tokens=20,
            stream=True,
        )
        return "".join([c.delta.content or "" async for chunk in stream for c in chunk.choices])

    async def complete(number: int) -> str:
        stream = await async_client.completions.create(
            model=MODEL, prompt=f"Number {number}", seed=number, max_tokens=20, stream=True
        )
        return "".join([c.text async for chunk in stream for c in chunk.choices])

    wishes = [(chat, number) for number in range(16)] + [(complete, n) for n in range(16)]
    together = await asyncio.gather(*[ask(number) for ask, number in wishes])
    alone = [await ask(number) for ask, number in wishes]
    assert together == alone
    assert len(set(together)) == 32


async def test_a_stream_that_is_left_ends_in_the_engine(
    async_client: openai.AsyncOpenAI, chatty: Server
) -> None:
    stream = await async_client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=480,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for _ in stream:
        break
    await stream.close()
    deadline = time.monotonic() + 5
    while 'vitrine_kv_blocks{state="referenced"} 0.0' not in metrics(chatty):
        assert time.monotonic() < deadline, "blocks still held after 5 s"
        await asyncio.sleep(0.02)
    assert "vitrine_requests_in_flight 0.0" in metrics(chatty)


def metrics(server: Server) -> str:
    return httpx2.get(f"{server.url}/metrics").text


@pytest.mark.slow
async def test_a_template_that_never_ends_harms_only_its_own_chats(tmp_path: Path) -> None:
    template = tmp_path / "forever.jinja"
    template.write_text(
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    )
    with running_server(tmp_path, "--threads", "1", "--chat-template", str(template)) as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            chats = [
                asyncio.create_task(client.chat.completions.create(model="stories", messages=TALK))
                for _ in range(3)
            ]
            await asyncio.sleep(0.3)
            answer = await client.completions.create(model="stories", prompt=PROMPT, max_tokens=5)
            assert answer.choices[0].text
            assert not chats[-1].done(), "three times 2 s passed: the template did not hold on"
            assert status(f"{server.url}/health/ready") == 200
            for chat in chats:
                with pytest.raises(openai.UnprocessableEntityError, match="within 2 s"):
                    await chat
        assert not workers_of(server), "the process of the template goes on"
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [("{% if %}", "line 1"), (None, "cannot be read"), ("x" * 2**21, "the limit is 1048576")],
)
def test_a_template_that_cannot_be_used_is_told_in_one_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    template = tmp_path / "chat.jinja"
    if content is not None:
        template.write_text(content)
    with running_server(tmp_path, "--chat-template", str(template), ready=False) as server:
        assert server.process.wait(30) == 1
        log = server.log.read_text()
        assert message in log.splitlines()[-1]
        assert "chat.jinja" in log.splitlines()[-1]
        assert "Traceback" not in log


def test_a_killed_api_leaves_no_worker(tmp_path: Path) -> None:
    model = make_chat_model(tmp_path)
    with running_server(tmp_path, "--threads", "1", "--model", str(model)) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=2)
        [worker] = workers_of(server)
        server.process.kill()
        _, alive = psutil.wait_procs([worker], timeout=5)
        assert not alive


def workers_of(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if "service.template_worker" in child.cmdline()]
