"""The app behind a real uvicorn: what ASGI-level tests cannot see of sockets and buffers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
import uvicorn

from tests.api.fake_engine import FakeStream, say
from tests.api.sse_parser import EventStreamParser

Houses = Callable[..., Any]


@contextmanager
def served(house: Any) -> Iterator[tuple[str, int]]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(house.app, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "not within 5 s"
        time.sleep(0.005)


def post_head(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return (
        b"POST /generate HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(data), data)
    )


def test_a_stream_over_a_socket(house: Houses) -> None:
    h = house()
    h.engine.script = say(*h.tokenizer.encode("line\nline \U0001f600"))
    parser = EventStreamParser()
    with served(h) as (host, port):
        url = f"http://{host}:{port}/generate"
        with httpx2.stream("POST", url, json={"prompt": "a"}, timeout=10) as response:
            events = [event for data in response.iter_bytes() for event in parser.feed(data)]
    assert events[-1].json["text"] == "line\nline \U0001f600"
    assert "".join(e.json["text"] for e in events if e.type == "token") == events[-1].json["text"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_cancels(house: Houses, stream: bool) -> None:
    h = house()
    with served(h) as address:
        with socket.create_connection(address) as client:
            client.sendall(post_head({"prompt": "a", "stream": stream}))
            wait_until(lambda: len(h.engine.streams) == 1)
        wait_until(lambda: h.engine.streams[0].cancelled)
        wait_until(lambda: h.counts()["requests_aborted_total"] == 1)
    h.check_balance()


def test_a_client_that_never_reads_and_goes_away_cancels(house: Houses) -> None:
    """The buffers fill up and `send` blocks; the disconnect must still be noticed."""

    def flood(stream: FakeStream) -> None:
        original = stream.take

        def endless() -> Any:
            asyncio.get_running_loop().call_soon(lambda: stream.give(*([65] * 2_000)))
            return original()

        stream.take = endless  # type: ignore[method-assign]
        stream.give(65)

    h = house(flood)
    with served(h) as address:
        with socket.create_connection(address) as client:
            client.sendall(post_head({"prompt": "a"}))
            wait_until(lambda: len(h.engine.streams) == 1)
            stream = h.engine.streams[0]
            reads = -1
            while reads != stream.num_reads:  # until nothing more goes in
                reads = stream.num_reads
                time.sleep(0.3)
            assert not stream.cancelled
        wait_until(lambda: stream.cancelled)
        wait_until(lambda: h.counts()["requests_aborted_total"] == 1)
    h.check_balance()


def test_a_body_over_the_limit_over_a_socket(house: Houses) -> None:
    h = house(max_body_bytes=1000)
    with served(h) as (host, port):
        url = f"http://{host}:{port}/generate"
        response = httpx2.post(url, json={"prompt": "a" * 2000}, timeout=10)
        assert response.status_code == 413
        assert response.headers["content-type"] == "application/problem+json"
