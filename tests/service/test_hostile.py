"""Bodies that no client means: refused in words by a real server, whose engine notices nothing."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.servers import Server

JSON = {"content-type": "application/json"}
REFERENCE = {"prompt": "Once upon a time", "max_tokens": 16, "seed": 3, "stream": False}
FIELDS = ["prompt", "text", "token_ids", "stop", "logit_bias", "seed", "temperature", "messages"]

field = st.sampled_from(FIELDS).map(lambda name: json.dumps(name).encode())
depths = st.sampled_from([1, 100, 199, 200, 201, 1000, 10_000, 500_000])
digits = st.sampled_from([1, 18, 19, 20, 309, 310, 4299, 4300, 4301, 100_000])


def wrapped(name: bytes, value: bytes) -> bytes:
    """A body whose other fields are right, so that this one is looked at."""
    rest = b"" if name == b'"prompt"' else b', "prompt": "a"'
    return b"{%b: %b%b}" % (name, value, rest)


nested_lists = depths.map(lambda n: b"[" * n + b"]" * n)
nested_objects = depths.map(lambda n: b'{"a":' * n + b"1" + b"}" * n)
unclosed = depths.map(lambda n: b"[" * n)
huge = st.builds(
    lambda n, sign, tail: sign + b"9" * n + tail,
    digits,
    st.sampled_from([b"", b"-"]),
    st.sampled_from([b"", b".5", b"e5", b"e999999999", b"e-999999999"]),
)
words = st.sampled_from([b"NaN", b"-NaN", b"Infinity", b"-Infinity", b"nan", b"True", b"'a'", b""])
escapes = st.lists(
    st.sampled_from([b"\\ud800", b"\\udfff", b"\\ud83d\\ud83d", b"\\u0000", b"a", b"\\ude00"]),
    min_size=1,
    max_size=5,
).map(lambda parts: b'"' + b"".join(parts) + b'"')
raw_bytes = st.binary(max_size=40).map(lambda data: b'"' + data + b'"')
long_texts = st.sampled_from([1, 2_000_000, 10_000_000]).map(lambda n: b'"' + b"a" * n + b'"')
empties = st.sampled_from([b'""', b"[]", b"{}", b"null", b'[""]', b"[[]]"])
values = st.one_of(
    nested_lists, nested_objects, unclosed, huge, words, escapes, raw_bytes, long_texts, empties
)
twice = st.builds(
    lambda name, a, b: b"{%b: %b, %b: %b}" % (name, a, name, b), field, empties, words
)
whole = st.one_of(
    st.binary(max_size=200),
    nested_lists,
    unclosed,
    twice,
    st.just(b"\xef\xbb\xbf{}"),
    st.just(b"\0" * 1000),
    st.text(max_size=50).map(lambda text: text.encode("utf-16")),
)
bodies = st.one_of(st.builds(wrapped, field, values), whole)


@pytest.fixture(scope="module")
def routes(server: Server) -> list[str]:
    """Every route that takes a body."""
    paths: dict[str, Any] = httpx2.get(f"{server.url}/openapi.json").json()["paths"]
    return [
        path for path, operations in paths.items() if "requestBody" in operations.get("post", {})
    ]


def tokens(server: Server) -> object:
    return server.generate(dict(REFERENCE))["choices"][0]["token_ids"]  # type: ignore[index]


def test_hostile_bodies_are_refused_and_nothing_is_left_of_them(
    server: Server, routes: list[str]
) -> None:
    before = tokens(server)
    engine = server.engine.pid
    assert {"/generate", "/tokenize", "/detokenize"} <= set(routes)

    @settings(
        max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(path=st.sampled_from(routes), body=bodies)
    def refused(path: str, body: bytes) -> None:
        response = client.post(path, content=body, headers=JSON)
        # Some are right after all: an empty list of ids, a text of one character.
        assert response.status_code in (200, 413, 422), (response.status_code, response.text[:500])
        if response.status_code != 200 and "/v1/" not in path:
            problem = response.json()
            assert problem["status"] == response.status_code
            assert len(problem["detail"]) < 2000

    # A time-out is a failure: nothing here takes the server long.
    with httpx2.Client(base_url=server.url, timeout=20) as client:
        refused()
    assert server.engine.pid == engine
    assert tokens(server) == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"prompt": ""}', 422),
        (b'{"prompt": []}', 422),
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413),
        (b'{"prompt": "' + b"a" * 4_000_000 + b'"}', 422),
        (b'{"prompt": "\\ud800"}', 422),
        (b'{"prompt": "\xff\xfe"}', 422),
        (b'{"prompt": "a", "temperature": NaN}', 422),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 422),
        (b'{"prompt": "a", "seed": 1, "seed": 2}', 422),
        (b'{"prompt": ' + b"[" * 1_000_000, 422),
    ],
)
def test_each_of_them_has_its_status(server: Server, body: bytes, status: int) -> None:
    response = httpx2.post(f"{server.url}/generate", content=body, headers=JSON, timeout=20)
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/problem+json"
