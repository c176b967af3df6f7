"""What every route has in common: ids, keys, sizes, types, and failures in one shape."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from service.client import EngineUnavailableError, NeverFitsError, QueueFullError
from tests.api.fake_engine import say

Houses = Callable[..., Any]
JSON = {"content-type": "application/json"}


def check_problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "instance"} <= set(problem)
    assert problem["status"] == status
    assert problem["instance"] == response.headers["x-request-id"]
    return problem


async def test_not_found_and_not_allowed(house: Houses) -> None:
    async with house().client() as client:
        problem = check_problem(await client.get("/nothing/\u00e9%ff"), 404)
        assert "GET /nothing" in problem["detail"]
        response = await client.get("/generate")
        problem = check_problem(response, 405)
        assert response.headers["allow"] == "POST"
        assert "POST" in problem["detail"]
        check_problem(await client.post("/generate/", json={}), 404)


@pytest.mark.parametrize(
    "declared", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""]
)
@pytest.mark.parametrize("path", ["/generate", "/tokenize", "/detokenize"])
async def test_another_media_type(house: Houses, declared: str | None, path: str) -> None:
    headers = {} if declared is None else {"content-type": declared}
    async with house().client() as client:
        response = await client.post(path, content=b'{"prompt": "a"}', headers=headers)
    assert "application/json" in check_problem(response, 415)["detail"]


@pytest.mark.parametrize("declared", ["application/json; charset=utf-8", "Application/JSON"])
async def test_json_by_its_other_spellings(house: Houses, declared: str) -> None:
    async with house(say()).client() as client:
        response = await client.post(
            "/generate", content=b'{"prompt": "a"}', headers={"content-type": declared}
        )
    assert response.status_code == 200


@pytest.mark.parametrize("sane", ["a", "A-b_c.9", "x" * 128])
async def test_a_sane_request_id_is_kept(house: Houses, sane: str) -> None:
    async with house().client() as client:
        for path in ("/health/live", "/nothing"):
            response = await client.get(path, headers={"x-request-id": sane})
            assert response.headers["x-request-id"] == sane


@pytest.mark.parametrize("other", ["", "a b", "x" * 129, "a\tb", "ä", "a:1", None])
async def test_any_other_request_id_is_replaced(house: Houses, other: str | None) -> None:
    headers = {} if other is None else {"x-request-id": other.encode()}
    async with house().client() as client:
        first = (await client.get("/health/live", headers=headers)).headers["x-request-id"]
        second = (await client.get("/health/live", headers=headers)).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", first)
    assert first != second


async def test_a_body_of_the_limit_is_taken(house: Houses) -> None:
    body = b'{"prompt": "a"}'
    async with house(say(), max_body_bytes=len(body)).client() as client:
        assert (await client.post("/generate", content=body, headers=JSON)).status_code == 200
        check_problem(await client.post("/generate", content=body + b" ", headers=JSON), 413)

        async def chunks() -> AsyncIterator[bytes]:
            for byte in body + b" ":
                yield bytes([byte])

        check_problem(await client.post("/generate", content=chunks(), headers=JSON), 413)


@pytest.mark.parametrize(
    ("error", "status", "after", "reason"),
    [
        (QueueFullError("8 requests wait; the limit is 8", 2.5), 429, "3", "queue-full"),
        (QueueFullError("full", 0), 429, "1", "queue-full"),
        (EngineUnavailableError("draining", 7), 503, "7", "unavailable"),
        (NeverFitsError("9 blocks of 8", field="max_tokens"), 422, None, "never-fits"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_refused_by_the_engine_before_any_byte_of_a_stream(
    house: Houses, error: Exception, status: int, after: str | None, reason: str, stream: bool
) -> None:
    h = house()
    h.engine.refuse = error
    async with h.client() as client:
        response = await client.post("/generate", json={"prompt": "a", "stream": stream})
    assert check_problem(response, status)["detail"] == str(error)
    assert response.headers.get("retry-after") == after
    assert h.counts()[f"requests_rejected_total:{reason}"] == 1
    assert h.counts()["requests_accepted_total"] == 0
    h.check_balance()


async def test_a_bug_is_500_without_internals(house: Houses) -> None:
    h = house()
    h.engine.refuse = RuntimeError("secret /path")
    async with h.client() as client:
        response = await client.post("/generate", json={"prompt": "a"})
    check_problem(response, 500)
    assert "secret" not in response.text


async def test_messages_with_lone_surrogates_are_encoded(house: Houses) -> None:
    h = house()
    h.engine.refuse = NeverFitsError("\ud800 does not fit", field="prompt")
    async with h.client() as client:
        response = await client.post("/generate", json={"prompt": "a"})
    assert check_problem(response, 422)["detail"] == "? does not fit"


async def test_a_client_that_goes_away_in_the_middle_of_its_body(house: Houses) -> None:
    h = house()
    messages = [
        {"type": "http.request", "body": b'{"prompt"', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "root_path": "",
        "http_version": "1.1",
        "scheme": "http",
    }
    await asyncio.wait_for(h.app(scope, receive, send), 5)
    assert h.engine.requests == []
    assert sent[0]["status"] == 499


async def test_the_interface_describes_itself(house: Houses) -> None:
    async with house().client() as client:
        assert (await client.get("/docs")).status_code == 200
        schema = (await client.get("/openapi.json")).json()
    assert {"/generate", "/tokenize", "/detokenize", "/info", "/metrics"} <= set(schema["paths"])
    components = schema["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(schema)))
    assert references <= set(components)
    fields = components["GenerateRequest"]["properties"]
    assert all("description" in field for field in fields.values())
    assert fields["temperature"]["maximum"] == 2
    assert components["GenerateRequest"]["additionalProperties"] is False
    assert components["GenerateRequest"]["required"] == ["prompt"]


def test_the_api_does_not_import_torch() -> None:
    code = (
        "import sys, service.api.app; "
        "sys.exit(', '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
