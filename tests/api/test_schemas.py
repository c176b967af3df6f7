"""Every field of a request: its bounds, its type, and what is said when they do not hold."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.fake_engine import CONTEXT_LENGTH, VOCAB_SIZE, say

Houses = Callable[..., Any]

# field, values at its bounds, values just outside or of another kind
BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    (
        "prompt",
        ["a", [0], [VOCAB_SIZE - 1]],
        ["", [], None, 5, True, {}, [-1], [VOCAB_SIZE], [1.0], ["a"], [True], [[1]], [2**63]],
    ),
    ("stream", [True, False], [0, 1, "true", None]),
    (
        "max_tokens",
        [1, CONTEXT_LENGTH - 3],
        [0, -1, CONTEXT_LENGTH - 2, CONTEXT_LENGTH + 1, 1.0, "5", None, True, 2**70],
    ),
    ("min_tokens", [0, 128], [-1, 129, 1.5, None]),
    ("temperature", [0, 2, 0.5], [-0.001, 2.001, "1", None, True]),
    ("top_k", [0, VOCAB_SIZE], [-1, VOCAB_SIZE + 1, 1.0, None]),
    ("top_p", [1e-9, 1], [0, 1.001, -1, None]),
    ("min_p", [0, 0.999], [1, -0.001, None]),
    ("repetition_penalty", [1e-9, 2], [0, 2.001, None]),
    ("presence_penalty", [-2, 2], [-2.001, 2.001, None]),
    ("frequency_penalty", [-2, 2], [-2.001, 2.001, None]),
    (
        "logit_bias",
        [{}, {"0": -100, str(VOCAB_SIZE - 1): 100}, {str(i): 0 for i in range(300)}],
        [
            {"0": 100.1},
            {"-1": 0},
            {"01": 0},
            {"a": 0},
            {"1.0": 0},
            {str(VOCAB_SIZE): 0},
            {"0": "1"},
            {"0": None},
            [],
            None,
            {str(i): 0 for i in range(301)},
        ],
    ),
    ("seed", [0, 2**63 - 1, None], [-1, 2**63, 1.0, "1", True]),
    ("n", [1, 16], [0, 17, 1.0, None]),
    ("stop", ["a", [], ["a"] * 16, "x" * 128], ["", [""], ["a"] * 17, "x" * 129, 5, None, [5]]),
    ("stop_token_ids", [[], [0] * 64, [VOCAB_SIZE - 1]], [[0] * 65, [-1], [VOCAB_SIZE], 5, None]),
    ("ignore_eos", [True, False], [1, None, "no"]),
    ("logprobs", [0, 20, None], [-1, 21, 1.0, True]),
    ("echo", [True, False], [1, None]),
    ("priority", [-10, 10], [-11, 11, 0.5, None]),
    ("timeout_s", [0.5, 600], [0, -1, 600.1, None, "5"]),
]
GOOD = [(field, value) for field, good, _ in BOUNDS for value in good]
BAD = [(field, value) for field, _, bad in BOUNDS for value in bad]


def named(case: tuple[str, Any]) -> str:
    return f"{case[0]}={str(case[1])[:20]}"


@pytest.mark.parametrize("case", GOOD, ids=named)
async def test_a_value_within_its_bounds_is_taken(house: Houses, case: tuple[str, Any]) -> None:
    field, value = case
    h = house(say(finish="stop"))
    exchange = h.exchange({"prompt": [5, 6, 7], field: value, "stream": field != "stream"})
    await exchange.finish()
    assert exchange.status == 200


@pytest.mark.parametrize("case", BAD, ids=named)
async def test_a_value_outside_is_refused_by_name(house: Houses, case: tuple[str, Any]) -> None:
    field, value = case
    h = house()
    exchange = h.exchange({"prompt": [5, 6, 7], field: value})
    await exchange.finish()
    assert exchange.status == 422
    assert exchange.headers["content-type"] == "application/problem+json"
    problem = json.loads(exchange.body)
    assert problem["field"] == field
    assert problem["detail"].startswith(field)
    assert problem["status"] == 422
    assert problem["instance"] == exchange.headers["x-request-id"]
    assert h.engine.streams == []
    assert h.counts()["requests_rejected_total:invalid-request"] == 1


@pytest.mark.parametrize("field", ["explian", "Prompt", "best_of", "x" * 500, "ключ"])
async def test_an_unknown_field_is_refused_by_name(house: Houses, field: str) -> None:
    exchange = house().exchange({"prompt": "a", field: 1})
    await exchange.finish()
    assert exchange.status == 422
    problem = json.loads(exchange.body)
    assert problem["detail"].startswith(field[:80])
    assert "unknown or unsupported" in problem["detail"]
    assert problem["field"] == (field if len(field) <= 80 else field[:80] + "...")


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, "prompt", ["required"]),
        ({"prompt": [1] * 250, "max_tokens": 7}, "max_tokens", ["250", "7", "256"]),
        ({"prompt": [1] * 256}, "prompt", ["256", "no room"]),
        ({"prompt": "a " * 60_000}, "prompt", ["120000 characters", "256"]),
        ({"prompt": "a" * 1000}, "prompt", ["1000 tokens", "256"]),
        ({"prompt": [1, 300]}, "prompt", ["300", "position 1", "300 tokens"]),
        ({"prompt": [1], "top_k": 301}, "top_k", ["301", "300"]),
        ({"prompt": [1], "min_tokens": 9, "max_tokens": 8}, "min_tokens", ["9", "8"]),
        ({"prompt": [1], "temperature": 2.5}, "temperature", ["2.5", "equal to 2"]),
        ({"prompt": [1], "timeout_s": 1000}, "timeout_s", ["1000", "600"]),
        ({"prompt": [1, -5]}, "prompt", ["prompt[1]", "-5"]),
    ],
)
async def test_messages_carry_the_value_and_the_limit(
    house: Houses, body: dict[str, Any], field: str, words: list[str]
) -> None:
    exchange = house().exchange(body)
    await exchange.finish()
    problem = json.loads(exchange.body)
    assert (exchange.status, problem["field"]) == (422, field)
    for word in words:
        assert word in problem["detail"]


async def test_all_wrong_fields_are_named(house: Houses) -> None:
    exchange = house().exchange({"prompt": [-1] * 100_000, "n": 99, "x": 1})
    await exchange.finish()
    assert exchange.status == 422
    assert len(exchange.body) < 2000
    assert "n: " in json.loads(exchange.body)["detail"]


MIB4 = 4 * 2**20
LONG = {
    "wrong ids": b'{"prompt": [' + b"-1," * (MIB4 // 3 - 10) + b"-1]}",
    "wrong kinds": b'{"prompt": [' + b'"",' * (MIB4 // 3 - 10) + b"1]}",
    "ids outside": b'{"prompt": [' + b"9," * (MIB4 // 2 - 20) + b"999]}",
    "too long": b'{"prompt": [' + b"9," * (MIB4 // 2 - 20) + b"9]}",
    "stops": b'{"prompt": "a", "stop": [' + b"1," * (MIB4 // 2 - 20) + b"9]}",
    "stop tokens": b'{"prompt": "a", "stop_token_ids": [' + b"-1," * (MIB4 // 3 - 20) + b"9]}",
    "fields": b"{" + b",".join(b'"%x":0' % i for i in range(MIB4 // 12)) + b"}",
    "biases": b'{"prompt": "a", "logit_bias": {'
    + b",".join(b'"x%x":0' % i for i in range(MIB4 // 12))
    + b"}}",
    "text": b'{"prompt": "' + b"a" * (MIB4 - 20) + b'"}',
}


@pytest.mark.parametrize("body", LONG.values(), ids=LONG.keys())
async def test_the_longest_bodies_do_not_stall_the_others(house: Houses, body: bytes) -> None:
    h = house()
    assert len(body) <= MIB4
    began = time.process_time()
    async with h.client() as client:
        response = await client.post(
            "/generate", content=body, headers={"content-type": "application/json"}
        )
    assert response.status_code == 422
    assert len(response.content) < 2000
    # Milliseconds to tens of them; a million errors told one by one were 10 s.
    assert time.process_time() - began < 1


HOSTILE = {
    "empty": b"",
    "no JSON": b"prompt=a",
    "truncated": b'{"prompt": "a"',
    "trailing comma": b'{"prompt": "a",}',
    "two values": b'{"prompt": "a"} {}',
    "list": b"[]",
    "null": b"null",
    "deep list": b"[" * 1_000_000,
    "deep object": b'{"prompt":' * 100_000,
    "deep prompt": b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "huge integer": b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
    "large integer": b'{"prompt": "a", "seed": ' + b"9" * 1_000 + b"}",
    "huge exponent": b'{"prompt": "a", "temperature": 1e999999999}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone surrogate in a key": b'{"prompt": "a", "\\udfff": 1}',
    "raw surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "no UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "control character": b'{"prompt": "\x01"}',
    "NUL": b"\0",
}


@pytest.mark.parametrize("path", ["/generate", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
async def test_hostile_bodies_are_422(house: Houses, path: str, body: bytes) -> None:
    async with house().client() as client:
        response = await client.post(
            path, content=body, headers={"content-type": "application/json"}
        )
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["title"]


async def test_malformed_json_says_where(house: Houses) -> None:
    async with house().client() as client:
        response = await client.post(
            "/generate",
            content=b'{"prompt": "a",\n oops}',
            headers={"content-type": "application/json"},
        )
    assert "line 2 column 2" in response.json()["detail"]
    assert "field" not in response.json()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
field_names = st.sampled_from([field for field, _, _ in BOUNDS]) | st.text(st.characters())


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=150,
    deadline=None,
)
@given(st.dictionaries(field_names, json_values, max_size=4))
async def test_no_body_is_a_server_error(house: Houses, body: dict[str, Any]) -> None:
    """Whatever is in the fields: it runs, or it is refused in words."""
    h = house(say(finish="stop"))
    exchange = h.exchange({"prompt": "a", **body})
    await exchange.finish()
    assert exchange.status in (200, 422)
    if exchange.status == 422:
        assert json.loads(exchange.body)["detail"]
    h.check_balance()
