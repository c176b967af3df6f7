"""What the log says of a request."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service import logs
from service.client import NeverFitsError
from tests.api.fake_engine import say

Houses = Callable[..., Any]


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The lines so far of the server's own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    own = logging.Filter("vitrine")
    root.handlers[0].addFilter(own)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:] = handlers
    root.setLevel(level)


async def test_one_line_a_request(house: Houses, log: Any) -> None:
    h = house(say(65, 66, 67))
    async with h.client() as client:
        headers = {"x-request-id": "mine"}
        body = {"prompt": [72, 73, 74], "n": 2, "stream": False}
        await client.post("/generate", json=body, headers=headers)
        await client.post("/generate", json={"prompt": [1], "top_k": -5})
        await client.get("/a/path?of=the-client's")
        await client.get("/health/live")
    done, refused, lost = log()
    assert {
        "event": "request",
        "id": "mine",
        "method": "POST",
        "route": "/generate",
        "status": 200,
        "key": None,
        "prompt_tokens": 3,
        "cached_prompt_tokens": 1,
        "completion_tokens": 6,
        "queue_s": 0.25,
        "finish_reasons": ["length", "length"],
        "outcome": ["finished"],
    }.items() <= done.items()
    assert 0 < done["time_to_first_token_s"] <= done["total_s"]
    assert (refused["status"], refused["problem"]) == (422, "invalid-request")
    assert (lost["route"], lost["status"]) == ("none", 404)
    assert "the-client" not in str(log())


async def test_the_line_of_a_client_that_went_away(house: Houses, log: Any) -> None:
    h = house()
    exchange = h.exchange({"prompt": "a"})
    await exchange.until_events(1)
    exchange.disconnect()
    await exchange.finish()
    (line,) = log()
    assert (line["outcome"], line["finish_reasons"]) == (["aborted"], [None])


async def test_a_bug_has_a_traceback_and_a_line(house: Houses, log: Any) -> None:
    h = house()
    h.engine.refuse = RuntimeError("oops")
    async with h.client() as client:
        await client.post("/generate", json={"prompt": "a"}, headers={"x-request-id": "mine"})
        h.engine.refuse = NeverFitsError("too long", field="prompt")
        await client.post("/generate", json={"prompt": "a"})
    trace, line, refused = log()
    assert (trace["level"], trace["id"], trace["exception"].splitlines()[-1]) == (
        "error",
        "mine",
        "RuntimeError: oops",
    )
    assert (line["level"], line["status"], line["problem"]) == ("error", 500, "internal")
    assert (refused["level"], refused["problem"]) == ("info", "never-fits")
