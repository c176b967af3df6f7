"""API keys: how they are written, who is let in, and as whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from service.api.identity import key_name_of
from service.api.keys import ApiKey, KeyFileError, api_key_hash, new_key, parse_keys
from tests.api.fake_engine import say
from tests.api.test_http import check_problem

Houses = Callable[..., Any]


async def test_api_keys(house: Houses) -> None:
    h = house(say(), api_keys=parse_keys(["one", "second:zwei \u00e9"]))
    async with h.client() as client:
        for path in ("/health/live", "/health/ready"):
            assert (await client.get(path)).status_code == 200
        for key in ("one", "zwei \u00e9"):
            headers = {"authorization": f"Bearer {key}".encode()}
            response = await client.post("/generate", json={"prompt": "a"}, headers=headers)
            assert response.status_code == 200, key
        wrong = [
            "Bearer",
            "Bearer ",
            "Bearer two",
            "Basic one",
            "one",
            "Bearer onetwo",
            b"Bearer \xff",
        ]
        for path in ("/generate", "/metrics", "/info", "/docs", "/openapi.json", "/nothing", "/"):
            for value in wrong:
                response = await client.post(path, headers={"authorization": value})
                check_problem(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"
            check_problem(await client.get(path), 401)
    assert len(h.engine.requests) == 2
    assert h.counts()["requests_rejected_total:unauthorized"] == 7 * (len(wrong) + 1)


async def test_the_name_of_the_key_is_known_to_the_routes(house: Houses) -> None:
    async def who(request: Request) -> Response:
        return Response(str(key_name_of(request)))

    for keys, names in (((), ["None", "None"]), (parse_keys(["a:one", "b:two"]), ["a", "b"])):
        h = house(api_keys=keys)
        h.app.add_route("/who", who)
        h.app.add_route("/health/who", who)
        async with h.client() as client:
            found = [
                (await client.get("/who", headers={"authorization": f"Bearer {key}"})).text
                for key in ("one", "two")
            ]
            assert found == names
            headers = {"authorization": "Bearer one"}
            assert (await client.get("/health/who", headers=headers)).text == "None"


def test_lines_of_every_kind() -> None:
    digest = api_key_hash("four").hex()
    lines = ["# a comment", "", "one", "  two:second:half  ", f"four:sha256:{digest.upper()}"]
    assert parse_keys(lines) == (
        ApiKey("key-3", api_key_hash("one")),
        ApiKey("two", api_key_hash("second:half")),
        ApiKey("four", api_key_hash("four")),
    )


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["name:"], "line 1: the key is empty"),
        (["# x", "a b:key"], "line 2: the name must be"),
        ([":key"], "line 1: the name must be"),
        (["x" * 65 + ":key"], "line 1: the name must be"),
        (["a:sha256:abc"], "line 1: after sha256: come 64"),
        (["a:one", "a:two"], "the name 'a' stands on several lines"),
        (["a:one", "one"], "the same key stands on several lines"),
    ],
)
def test_a_line_that_holds_no_key_is_refused(lines: list[str], words: str) -> None:
    with pytest.raises(KeyFileError, match=words):
        parse_keys(lines)


def test_what_is_refused_does_not_show_the_key() -> None:
    with pytest.raises(KeyFileError) as raised:
        parse_keys(["a b:secret-word"])
    assert "secret-word" not in str(raised.value)


def test_a_drawn_key_is_known_by_its_line() -> None:
    key, line = new_key("alice")
    assert parse_keys([line]) == (ApiKey("alice", api_key_hash(key)),)
    assert key not in line
    assert len(key) >= 43
    assert new_key("alice")[0] != key
