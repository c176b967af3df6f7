"""regex, grammar and response_format: bounds, what excludes what, and what the engine is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from model.grammar_spec import GrammarSpec
from service.api.response_format import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH
from service.api.schemas import MAX_GRAMMAR_CHARS, MAX_REGEX_CHARS
from service.grammars import GrammarError
from service.grammars.checker import CheckerBusyError
from tests.api.fake_engine import FakeStream, say

Houses = Callable[..., Any]


class TakesAll:
    """A checker that says what the test tells it to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def check(self, spec: GrammarSpec, info: object) -> None:
        if self.error is not None:
            raise self.error


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema} | more}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def of_bytes(count: int) -> dict[str, Any]:
    return {"description": "x" * (count - len('{"description":""}'))}


GOOD: list[tuple[str, Any, GrammarSpec | None]] = [
    ("regex", None, None),
    ("regex", "a+", GrammarSpec("regex", "a+")),
    ("regex", "a" * MAX_REGEX_CHARS, GrammarSpec("regex", "a" * MAX_REGEX_CHARS)),
    ("grammar", 'start: "a"', GrammarSpec("lark", 'start: "a"')),
    ("response_format", None, None),
    ("response_format", {"type": "text"}, None),
    (
        "response_format",
        {"type": "json_object"},
        GrammarSpec("json_schema", '{"type":"object"}'),
    ),
    (
        "response_format",
        schema_format({"b": 1, "a": "é"}, strict=True, description="what it is for"),
        GrammarSpec("json_schema", '{"b":1,"a":"é"}'),
    ),
    (
        "response_format",
        schema_format(nested(MAX_SCHEMA_DEPTH), strict=None),
        GrammarSpec("json_schema", json.dumps(nested(MAX_SCHEMA_DEPTH), separators=(",", ":"))),
    ),
    (
        "response_format",
        schema_format({"minProperties": 3, "additionalProperties": False}),
        GrammarSpec("json_schema", '{"minProperties":3,"additionalProperties":false}'),
    ),
]
BAD: list[tuple[str, Any, str]] = [
    ("regex", "", "at least 1 character"),
    ("regex", "a" * (MAX_REGEX_CHARS + 1), str(MAX_REGEX_CHARS)),
    ("regex", 5, "string"),
    ("grammar", "", "at least 1 character"),
    ("grammar", "a" * (MAX_GRAMMAR_CHARS + 1), str(MAX_GRAMMAR_CHARS)),
    ("grammar", ["start"], "string"),
    ("response_format", "json_object", "type text, json_object or json_schema"),
    ("response_format", {"type": "xml"}, "type text, json_object or json_schema"),
    ("response_format", {"type": ["text"]}, "type text, json_object or json_schema"),
    ("response_format", {}, "type text, json_object or json_schema"),
    ("response_format", {"type": "text", "x": 1}, "response_format.x: unknown"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema: this field is"),
    ("response_format", schema_format(True), "response_format.json_schema.schema"),
    ("response_format", schema_format({}, name="a b"), "response_format.json_schema.name"),
    ("response_format", schema_format({}, strict="yes"), "strict"),
    ("response_format", schema_format({}, lenient=True), "lenient: unknown"),
    ("response_format", schema_format(nested(MAX_SCHEMA_DEPTH + 1)), f"than {MAX_SCHEMA_DEPTH}"),
    (
        "response_format",
        schema_format(of_bytes(MAX_SCHEMA_BYTES + 1)),
        f"{MAX_SCHEMA_BYTES + 1} bytes of JSON; the limit is {MAX_SCHEMA_BYTES}",
    ),
    ("response_format", schema_format({"items": {"x-guidance": {}}}), "x-guidance"),
    ("response_format", schema_format({"minProperties": 2}), "minProperties 2"),
]


def named(case: tuple[str, Any, object]) -> str:
    return f"{case[0]}={str(case[1])[:30]}"


@pytest.mark.parametrize("case", GOOD, ids=named)
async def test_the_engine_is_told_the_grammar(
    house: Houses, case: tuple[str, Any, GrammarSpec | None]
) -> None:
    field, value, spec = case
    h = house(say(finish="stop"), grammars=TakesAll())
    exchange = h.exchange({"prompt": [5], field: value, "n": 2})
    await exchange.finish()
    assert exchange.status == 200
    assert [request.sampling.grammar for request in h.engine.requests] == [spec, spec]


@pytest.mark.parametrize("case", BAD, ids=named)
async def test_what_is_out_of_bounds_is_refused_by_name(
    house: Houses, case: tuple[str, Any, str]
) -> None:
    field, value, words = case
    h = house(grammars=TakesAll())
    exchange = h.exchange({"prompt": [5], field: value})
    await exchange.finish()
    problem = json.loads(exchange.body)
    assert (exchange.status, problem["field"]) == (422, field)
    assert words in problem["detail"]
    assert len(problem["detail"]) < 600
    assert h.engine.streams == []


async def test_a_schema_at_its_limit_is_taken(house: Houses) -> None:
    h = house(say(finish="stop"), grammars=TakesAll())
    exchange = h.exchange(
        {"prompt": [5], "response_format": schema_format(of_bytes(MAX_SCHEMA_BYTES))}
    )
    await exchange.finish()
    assert exchange.status == 200


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
async def test_a_number_that_is_no_json_is_refused(house: Houses, number: str) -> None:
    body = json.dumps({"prompt": [5], "response_format": schema_format({"const": "HERE"})})
    async with house(grammars=TakesAll()).client() as client:
        response = await client.post(
            "/generate",
            content=body.replace('"HERE"', number),
            headers={"content-type": "application/json"},
        )
    assert response.status_code == 422
    assert "a number that is no JSON" in response.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"regex": "a", "grammar": "start: x"}, "grammar", "regex is there too"),
        ({"regex": "a", "response_format": {"type": "text"}}, "response_format", "at most one"),
        ({"regex": "a", "min_tokens": 3}, "min_tokens", "3 is not possible with regex"),
        (
            {"response_format": {"type": "json_object"}, "ignore_eos": True},
            "ignore_eos",
            "not possible with response_format",
        ),
    ],
)
async def test_fields_that_exclude_each_other(
    house: Houses, fields: dict[str, Any], field: str, words: str
) -> None:
    exchange = house(grammars=TakesAll()).exchange({"prompt": [5]} | fields)
    await exchange.finish()
    problem = json.loads(exchange.body)
    assert (exchange.status, problem["field"]) == (422, field)
    assert words in problem["detail"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("regex", "a"),
        ("grammar", 'start: "a"'),
        ("response_format", {"type": "json_object"}),
    ],
)
async def test_a_server_without_the_library_says_so(house: Houses, field: str, value: Any) -> None:
    h = house(say(finish="stop"))
    exchange = h.exchange({"prompt": [5], field: value})
    await exchange.finish()
    problem = json.loads(exchange.body)
    assert (exchange.status, problem["field"]) == (422, field)
    assert "vitrine[grammar]" in problem["detail"]
    text = h.exchange({"prompt": [5], "response_format": {"type": "text"}})
    await text.finish()
    assert text.status == 200, "any text needs no library"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (GrammarError("it is no good"), 422, "regex: it is no good"),
        (CheckerBusyError("16 new grammars wait"), 429, "16 new grammars wait"),
        (TimeoutError(), 429, "timeout_s"),
        (RuntimeError("the worker's secret path"), 500, "the server failed"),
    ],
)
async def test_how_a_check_that_fails_is_answered(
    house: Houses, error: Exception, status: int, words: str
) -> None:
    h = house(grammars=TakesAll(error))
    exchange = h.exchange({"prompt": [5], "regex": "a"})
    await exchange.finish()
    assert exchange.status == status
    assert words in json.loads(exchange.body)["detail"]
    assert (status == 429) == ("retry-after" in exchange.headers)
    assert h.engine.streams == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_grammar_that_fails_on_the_way_is_told_with_its_field(
    house: Houses, stream: bool
) -> None:
    def script(engine_stream: FakeStream) -> None:
        engine_stream.give(7, 8)
        engine_stream.give(finish="error", error="too many items", is_grammar_error=True)

    h = house(script, grammars=TakesAll())
    exchange = h.exchange(
        {"prompt": [5], "response_format": {"type": "json_object"}, "stream": stream}
    )
    await exchange.finish()
    data = exchange.body.decode().rsplit("data: ", 1)[-1]
    problem = json.loads(data)
    assert (problem["status"], problem["field"]) == (422, "response_format")
    assert "cannot go on after 2 tokens: too many items" in problem["detail"]
    assert exchange.status == (200 if stream else 422)
    h.check_balance()
