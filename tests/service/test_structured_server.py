"""Structured output over HTTP, on real processes, with an engine that dies half-way."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import psutil
import pytest

from tests.servers import Server, running_server
from tests.service.test_server import wait_until_nothing_in_flight

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 30},
        "pages": {"type": "integer", "minimum": 1, "maximum": 300},
        "people": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 10},
                    "is_old": {"type": "boolean"},
                },
                "required": ["name", "is_old"],
                "additionalProperties": False,
            },
            "minItems": 6,
            "maxItems": 6,
        },
    },
    "required": ["title", "pages", "people"],
    "additionalProperties": False,
}
SLOW = {"type": "integer", "multipleOf": 999_983}  # 8 s to compile
BOOK: dict[str, Any] = {
    "prompt": "Once upon a time",
    "seed": 3,
    "max_tokens": 400,
    "response_format": {"type": "json_schema", "json_schema": {"name": "book", "schema": SCHEMA}},
}


def choices(answer: dict[str, object]) -> list[dict[str, Any]]:
    return answer["choices"]  # type: ignore[return-value]


def refused(server: Server, fields: dict[str, object]) -> dict[str, Any]:
    body = {"prompt": "Once", "stream": False} | fields
    response = httpx2.post(f"{server.url}/generate", json=body, timeout=60)
    assert response.status_code == 422, response.text
    problem: dict[str, Any] = response.json()
    return problem


def test_each_continuation_fits_the_schema(server: Server) -> None:
    answer = server.generate(BOOK | {"n": 4})
    texts = [choice["text"] for choice in choices(answer)]
    assert len(set(texts)) == 4
    for choice in choices(answer):
        assert choice["finish_reason"] == "stop"
        assert "stop_reason" not in choice
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)


def test_a_stream_is_the_same_text(server: Server) -> None:
    events = list(server.events(BOOK))
    assert events[-1][0] == "done"
    assert events[-1][1]["text"] == choices(server.generate(BOOK))[0]["text"]


def test_regex_grammar_and_any_object(server: Server) -> None:
    plain: dict[str, object] = {"prompt": "Once", "seed": 1, "max_tokens": 300}
    regex = server.generate(plain | {"regex": "[A-Z][a-z]{2,8}, [0-9]{1,3} years"})
    assert re.fullmatch("[A-Z][a-z]{2,8}, [0-9]{1,3} years", choices(regex)[0]["text"])
    lark = server.generate(plain | {"grammar": 'start: ("tick" | "tock") (" " start)?'})
    assert re.fullmatch("(tick|tock)( (tick|tock))*", choices(lark)[0]["text"])
    cut = server.generate(plain | {"response_format": {"type": "json_object"}, "max_tokens": 2})
    assert choices(cut)[0]["finish_reason"] == "length"
    assert choices(cut)[0]["text"].startswith("{")


def test_a_stop_string_ends_a_text_before_its_grammar_does(server: Server) -> None:
    answer = choices(server.generate(BOOK | {"stop": '"pages"'}))[0]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", '"pages"')
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer["text"])


def test_logprobs_are_the_models_own(server: Server) -> None:
    """Before the mask: of the first token's alternatives none is the one that JSON needs."""
    answer = choices(server.generate(BOOK | {"logprobs": 5}))[0]
    first = answer["logprobs"][0]
    assert first["text"].startswith("{")
    assert first["rank"] > 5
    assert not any(other["text"].startswith("{") for other in first["top"])


def test_an_engine_that_dies_half_way_changes_nothing(tmp_path: Path) -> None:
    with running_server(tmp_path, "--threads", "1", unhurried=True) as server:
        events = server.events(BOOK)
        for _ in range(20):
            next(events)
        server.engine.kill()
        server.hurry()
        rest = list(events)
        undisturbed = choices(server.generate(BOOK))[0]["text"]
        assert rest[-1][0] == "done"
        assert rest[-1][1]["text"] == undisturbed
        jsonschema.validate(json.loads(undisturbed), SCHEMA)
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


def test_a_grammar_that_would_take_for_ever_disturbs_nobody(server: Server) -> None:
    slow = {"type": "json_schema", "json_schema": {"name": "x", "schema": SLOW}}
    began = time.monotonic()
    problem = refused(server, {"response_format": slow})
    assert problem["field"] == "response_format"
    assert "more than 2 s to compile" in problem["detail"]
    began = time.monotonic()
    assert refused(server, {"response_format": slow})["detail"] == problem["detail"]
    assert time.monotonic() - began < 2, "the verdict was forgotten"
    assert choices(server.generate(BOOK))[0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"regex": "a("}, "regex", "unclosed group"),
        ({"grammar": "start: nothing"}, "grammar", "nothing"),
        ({"regex": "a", "min_tokens": 2, "max_tokens": 9}, "min_tokens", "regex"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"uniqueItems": True}},
                }
            },
            "response_format",
            "uniqueItems",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(
    server: Server, fields: dict[str, object], field: str, words: str
) -> None:
    problem = refused(server, fields)
    assert problem["field"] == field
    assert words in problem["detail"]


def test_a_grammar_that_becomes_too_complex_ends_with_its_error(server: Server) -> None:
    problem = refused(
        server, {"grammar": 'start: ("a"? | "b"?){1,2000}\n', "logit_bias": {"0": -100}}
    )
    assert problem["field"] == "grammar"
    assert re.search(
        r"continuation 0 cannot go on after \d+ tokens: .*many items", problem["detail"]
    )
    wait_until_nothing_in_flight(server)


def test_the_worker_ends_with_the_server(tmp_path: Path) -> None:
    with running_server(tmp_path, "--threads", "1", "--no-standby") as server:
        children = psutil.Process(server.process.pid).children
        assert len(children()) == 1, "there is no worker before the first grammar"
        server.generate(BOOK)
        before = children()
        assert len(before) == 2
        assert server.stop() == 0
        _, alive = psutil.wait_procs(before, timeout=5)
        assert alive == []
        assert "Traceback" not in server.log.read_text()
