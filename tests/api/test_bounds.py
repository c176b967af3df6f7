"""What a request may bring: headers, bodies, time; and how a refusal reaches its client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from service.api import middleware
from tests.api.fake_engine import say
from tests.api.test_http import JSON, check_problem

Houses = Callable[..., Any]


class Played:
    """A request whose body comes as the test says; `log` has reads and sends in their order."""

    def __init__(self, app: Any, length: str | None, chunk: bytes = b"x" * 60) -> None:
        headers = [(b"content-type", b"application/json")]
        if length is not None:
            headers.append((b"content-length", length.encode()))
        self.app, self.chunk = app, chunk
        self.log: list[str] = []
        self.body = b""
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.last_after: int | None = None  # the chunks there are; None: no end
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/generate",
            "headers": headers,
            "query_string": b"",
            "root_path": "",
            "http_version": "1.1",
            "scheme": "http",
        }

    async def receive(self) -> dict[str, Any]:
        self.log.append("read")
        more = self.last_after is None or self.log.count("read") < self.last_after
        return {"type": "http.request", "body": self.chunk, "more_body": more}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        elif message["body"]:
            self.log.append("answer")
            self.body += message["body"]
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.log.append("end")

    async def run(self) -> dict[str, Any]:
        await asyncio.wait_for(self.app(self.scope, self.receive, self.send), 10)
        problem: dict[str, Any] = json.loads(self.body)
        return problem


async def test_a_body_over_the_limit_is_refused_before_it_is_read(house: Houses) -> None:
    played = Played(house(max_body_bytes=100).app, "101")
    played.last_after = 2
    problem = await played.run()
    assert played.status == 413
    assert "101 bytes" in problem["detail"]
    assert "100 bytes" in problem["detail"]
    assert played.log == ["answer", "read", "read", "end"]


@pytest.mark.parametrize("length", [None, "80", "9" * 400])
async def test_a_body_that_turns_out_too_long(house: Houses, length: str | None) -> None:
    played = Played(house(max_body_bytes=100).app, length)
    played.last_after = 5
    await played.run()
    assert played.status == 413
    assert played.log.index("answer") <= 2
    assert played.log.count("read") == 5
    assert played.log[-1] == "end"


async def test_a_refused_body_without_end_is_not_read_for_ever(
    house: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "LINGER_BYTES", 600)
    played = Played(house(max_body_bytes=100).app, None)
    await played.run()
    assert played.log[-1] == "end"
    assert 10 <= played.log.count("read") <= 15


async def test_a_refused_body_that_does_not_come_is_not_waited_for(
    house: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "LINGER_S", 0.05)
    played = Played(house(max_body_bytes=100).app, "101")

    async def never() -> dict[str, Any]:
        return await asyncio.get_running_loop().create_future()

    played.receive = never  # type: ignore[method-assign]
    await played.run()
    assert (played.status, played.log) == (413, ["answer", "end"])


async def test_a_body_that_does_not_come_is_408(
    house: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "LINGER_S", 0.05)
    played = Played(house(body_timeout_s=0.05).app, "100", b"x")
    first = played.receive

    async def once() -> dict[str, Any]:
        if not played.log:
            return await first()
        return await asyncio.get_running_loop().create_future()

    played.receive = once  # type: ignore[method-assign]
    problem = await played.run()
    assert played.status == 408
    assert problem["detail"].startswith("1 bytes of the body came within 0.05 s")
    assert played.headers[b"connection"] == b"close"


async def test_a_stream_may_take_longer_than_its_body(house: Houses) -> None:
    h = house(body_timeout_s=0.02)
    exchange = h.exchange({"prompt": "a"})
    await exchange.until_events(1)
    await asyncio.sleep(0.1)
    h.engine.streams[0].give(5, finish="length")
    assert [event.type for event in await exchange.finish()][-1] == "done"


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({f"x-{i}": "a" for i in range(10_000)}, "headers of"),
        ({"x-long": "a" * 40_000}, "the limits are 100 and 32768"),
    ],
)
async def test_too_many_headers_are_431(house: Houses, headers: dict[str, str], words: str) -> None:
    async with house().client() as client:
        response = await client.get("/info", headers=headers)
        assert words in check_problem(response, 431)["detail"]
        assert (await client.get("/info", headers={"x": "a" * 10_000})).status_code == 200


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "prompt"),
        (b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "1"),
        (b'{"prompt": "a", "n": 1, "seed": 2, "\\u006e": 1}', "n"),
        (b'{"prompt": "a", "' + b"x" * 500 + b'": 1, "' + b"x" * 500 + b'": 1}', "x" * 80),
    ],
)
async def test_a_name_that_stands_twice_is_refused(house: Houses, body: bytes, name: str) -> None:
    async with house().client() as client:
        response = await client.post("/generate", content=body, headers=JSON)
    assert f"the name '{name}' stands twice" in check_problem(response, 422)["detail"]


@pytest.mark.parametrize("path", ["/generate", "/tokenize", "/detokenize"])
async def test_far_too_many_values_are_refused_unbuilt(house: Houses, path: str) -> None:
    """Half a million ids took the event loop 175 ms, during which no stream got a token."""
    field = "token_ids" if path == "/detokenize" else "prompt"
    body = b'{"%b": [%b9]}' % (field.encode(), b"9," * 1_000_000)
    began = time.process_time()
    async with house().client() as client:
        response = await client.post(path, content=body, headers=JSON)
    problem = check_problem(response, 422)
    assert problem["field"] == field
    assert "1000001 values" in problem["detail"]
    assert "limit is 100000" in problem["detail"]
    assert time.process_time() - began < 0.5


async def test_a_text_with_many_commas_is_a_text(house: Houses) -> None:
    async with house(say()).client() as client:
        body = {"prompt": "a" + "," * 200_000}
        problem = check_problem(await client.post("/generate", json=body), 422)
    assert "200001 characters are at least" in problem["detail"]


async def test_pages_of_other_origins(house: Houses) -> None:
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with house().client() as client:
        response = await client.options("/generate", headers=asks)
        assert response.status_code == 405
        assert "access-control-allow-origin" not in response.headers
    async with house(say(), cors_origins=("https://a.example",)).client() as client:
        response = await client.options("/generate", headers=asks)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        asks["origin"] = "https://b.example"
        response = await client.options("/generate", headers=asks)
        assert "access-control-allow-origin" not in response.headers
        response = await client.post(
            "/generate", json={"prompt": "a"}, headers={"origin": "https://a.example"}
        )
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert "X-Request-Id" in response.headers["access-control-expose-headers"]


async def test_the_documentation_needs_nothing_of_the_network(house: Houses) -> None:
    async with house().client() as client:
        response = await client.get("/docs")
    page = response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    for word in ("POST /generate", "temperature", "GREEDY", "\N{LESS-THAN OR EQUAL TO} 2"):
        assert word.lower() in page.lower()
    assert "default 128" in page
