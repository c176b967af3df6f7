"""The checks of a stream: a right one passes, and each broken promise is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loadtests.load.events import parse
from loadtests.load.integrity import ChatStream, Expected, GenerateStream, Received

Json = dict[str, Any]
REQUEST = "abc:1"  # an id may have colons


def usage(prompt: int = 3, completion: int = 2) -> Json:
    return {
        "prompt_tokens": prompt,
        "cached_prompt_tokens": 0,
        "completion_tokens": completion,
    }


def whole() -> list[tuple[str, Json]]:
    """A right stream of two tokens."""
    return [
        ("start", {"id": REQUEST, "model": "m", "prompt_tokens": 3, "seed": 1}),
        ("token", {"index": 0, "text": " a", "token_ids": [5]}),
        ("token", {"index": 0, "text": "\n", "token_ids": [6]}),
        (
            "done",
            {"index": 0, "finish_reason": "length", "text": " a\n", "usage": usage(), "timing": {}},
        ),
    ]


def read(events: list[tuple[str, Json]], numbers: list[int] | None = None) -> Received:
    stream = GenerateStream(Expected(2, 3, ignore_eos=True))
    for number, (name, data) in zip(numbers or range(len(events)), events, strict=True):
        block = f"id: {REQUEST}:{number}\nevent: {name}\ndata: {json.dumps(data)}\n\n"
        stream.take(parse(block.encode()))
    return stream.end()


def test_a_right_stream_has_no_violation() -> None:
    received = read(whole())
    assert received.violations == []
    assert received.num_tokens == 2
    assert "".join(received.text) == " a\n"


def test_comments_are_no_events() -> None:
    stream = GenerateStream(Expected(2))
    assert stream.take(parse(b": keep-alive\n\n")) == 0
    assert stream.received.violations == []


def test_data_lines_are_joined() -> None:
    event = parse(b"id: x:0\nevent: token\ndata: {\ndata: }\n\n")
    assert (event.id, event.name, event.data) == ("x:0", "token", b"{\n}")


def changed(place: int, **fields: Any) -> list[tuple[str, Json]]:
    events = whole()
    events[place][1].update(fields)
    return events


@pytest.mark.parametrize(
    ("events", "numbers", "violation"),
    [
        (whole(), [0, 2, 1, 3], "event id 'abc:1:2', expected abc:1:1"),
        (whole(), [0, 1, 1, 2], "event id 'abc:1:1', expected abc:1:2"),
        (whole()[1:], [0, 1, 2], "event 0 is token"),
        (whole()[:-1], None, "ended without done or error"),
        ([*whole(), whole()[1]], None, "after the last one: token"),
        (changed(3, text=" a"), None, "not done.text"),
        (changed(3, usage=usage(completion=3)), None, "usage says 3 tokens, 2 were received"),
        (changed(3, usage=usage(prompt=4)), None, "usage says 4 prompt tokens, start said 3"),
        (changed(0, prompt_tokens=4), None, "start says 4 prompt tokens, 3 were sent"),
        (changed(0, id="other"), None, "start.id 'other'"),
        (changed(1, token_ids=[5, 7]), None, "3 tokens, max_tokens is 2"),
        (changed(2, token_ids=[]), None, "finish_reason length after 1 of 2 tokens"),
        (changed(2, index=1), None, "a token of index 1"),
        (changed(3, finish_reason="stop"), None, "stop with ignore_eos"),
        ([*whole()[:1], ("noise", {}), *whole()[1:]], None, "not known: noise"),
    ],
)
def test_each_broken_promise_is_named(
    events: list[tuple[str, Json]], numbers: list[int] | None, violation: str
) -> None:
    assert any(violation in one for one in read(events, numbers).violations)


def test_an_error_event_is_the_servers_failure_not_ours() -> None:
    received = read([*whole()[:2], ("error", {"title": "Engine", "detail": "it died"})])
    assert received.violations == []
    assert (received.finish_reason, received.failure) == ("error", "it died")


def chunk(**fields: Any) -> Json:
    return {"id": "c", "object": "chat.completion.chunk", "choices": [], "usage": None} | fields


def choice(finish_reason: str | None = None, **delta: str) -> list[Json]:
    return [{"index": 0, "delta": delta, "finish_reason": finish_reason}]


TOTALS = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def chat() -> list[Json]:
    """A right answer of two tokens."""
    return [
        chunk(choices=choice(role="assistant", content="")),
        chunk(choices=choice(content="a")),
        chunk(choices=choice(content="b")),
        chunk(choices=choice("length")),
        chunk(usage=TOTALS),
    ]


def read_chat(chunks: list[Json], *, ends: bool = True) -> Received:
    stream = ChatStream(Expected(2))
    for one in [*map(json.dumps, chunks), *(["[DONE]"] if ends else [])]:
        stream.take(parse(f"data: {one}\n\n".encode()))
    return stream.end()


def test_a_right_chat_has_no_violation() -> None:
    received = read_chat(chat())
    assert received.violations == []
    assert (received.num_tokens, "".join(received.text)) == (2, "ab")


@pytest.mark.parametrize(
    ("chunks", "violation"),
    [
        (chat()[1:], "role None after ''"),
        ([*chat()[:1], *chat()], "role 'assistant' after 'assistant'"),
        ([*chat()[:-2], chat()[-1]], "no finish_reason"),
        (chat()[:-1], "no usage"),
        ([*chat()[:-1], chunk(usage=TOTALS | {"total_tokens": 6})], "not the sum"),
        ([*chat(), chat()[-1]], "usage in another chunk than the last"),
        ([*chat()[:2], chunk(id="d", choices=choice(content="b")), *chat()[3:]], "'d' in a stream"),
        ([*chat()[:-1], chat()[1], chat()[-1]], "after its finish_reason"),
    ],
)
def test_each_promise_broken_in_a_chat_is_named(chunks: list[Json], violation: str) -> None:
    assert any(violation in one for one in read_chat(chunks).violations)


def test_a_chat_ends_with_done() -> None:
    assert read_chat(chat(), ends=False).violations == ["the stream ended without [DONE]"]
