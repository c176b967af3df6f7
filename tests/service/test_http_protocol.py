"""Bounds of a connection, over sockets: heads that are too large, too late, or too many."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from service.api.app import create_app
from service.api.limits import ApiLimits
from service.http_protocol import ConnectionLimits, bounded
from tests.api.conftest import make_tokenizer
from tests.api.fake_engine import FakeEngine, say

Address = tuple[str, int]


def make_app(**limits: int) -> FastAPI:
    engine = FakeEngine(say(5, 6))
    return create_app(ApiLimits(**limits), engine, make_tokenizer, "case")  # type: ignore[arg-type]


@contextmanager
def served(app: FastAPI, **limits: float) -> Iterator[Address]:
    with running(app, **limits) as (address, _):
        yield address


@contextmanager
def running(app: FastAPI, **limits: float) -> Iterator[tuple[Address, uvicorn.Server]]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        log_level="critical",
        timeout_graceful_shutdown=1,
        http=bounded(ConnectionLimits(**limits)),  # type: ignore[arg-type]
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        yield listener.getsockname(), server
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes."""
    connection.settimeout(10)
    data = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return data
        if not piece:
            return data
        data += piece


def is_well(address: Address) -> bool:
    with closing(http.client.HTTPConnection(*address, timeout=10)) as connection:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200


HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "a header": (HEAD + b"x: ", b"a" * 8192),
    "headers": (HEAD, b"x: a\r\n" * 1000),
    "a name": (HEAD, b"a" * 8192),
    "a path": (b"GET /", b"a" * 8192),
    "trailers": (
        HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n",
        b"x: a\r\n" * 1000,
    ),
    "the extension of a chunk": (
        HEAD + b"transfer-encoding: chunked\r\n\r\n1;x=",
        b"a" * 8192,
    ),
}


@pytest.mark.parametrize(("begin", "rest"), ENDLESS.values(), ids=ENDLESS.keys())
def test_what_has_no_end_is_cut_off(begin: bytes, rest: bytes) -> None:
    with served(make_app()) as address:
        with socket.create_connection(address) as connection:
            connection.settimeout(10)
            num_sent = 0
            with pytest.raises(OSError, match=r"reset|pipe|abort"):  # noqa: PT012
                connection.sendall(begin)
                while num_sent < 64 * 2**20:
                    connection.sendall(rest)
                    num_sent += len(rest)
        assert num_sent < 16 * 2**20, "what the system's buffers hold, not what a client likes"
        assert is_well(address)


def test_a_head_that_is_too_large_is_told() -> None:
    with served(make_app()) as address, socket.create_connection(address) as connection:
        connection.sendall(HEAD + b"x: " + b"a" * 66_000)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 431 ")
    problem = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert problem["type"] == "urn:vitrine:problem:headers-too-large"
    assert "65536" in problem["detail"]


def test_ten_thousand_headers_are_refused_and_the_next_is_served() -> None:
    with served(make_app()) as address:
        with socket.create_connection(address) as connection:
            connection.sendall(HEAD + b"a: b\r\n" * 10_000 + b"\r\n")
            assert read_all(connection).startswith(b"HTTP/1.1 431 ")
        assert is_well(address)


@pytest.mark.parametrize("sent", [b"", b"GET /in", HEAD + b"x: y\r\n"])
def test_a_head_that_does_not_come_is_not_waited_for(sent: bytes) -> None:
    with served(make_app(), head_s=0.2) as address:
        with socket.create_connection(address) as connection:
            connection.sendall(sent)
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert is_well(address)


def test_the_deadline_of_a_head_is_not_that_of_an_answer() -> None:
    engine = FakeEngine()
    app = create_app(ApiLimits(), engine, make_tokenizer, "case")
    body = b'{"prompt": "a", "stream": false}'
    with served(app, head_s=0.1) as address, socket.create_connection(address) as connection:
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        deadline = time.monotonic() + 10
        while not engine.streams:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.4)
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_connections_are_bounded() -> None:
    with served(make_app(), max_connections=3) as address:
        open_ones = [socket.create_connection(address) for _ in range(3)]
        with socket.create_connection(address) as one_more:
            answer = read_all(one_more)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 1\r\n" in answer
        for connection in open_ones:
            connection.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                if is_well(address):
                    break
            except (http.client.HTTPException, OSError):
                assert time.monotonic() < deadline
            time.sleep(0.01)


def refused(address: Address, body: Any, headers: dict[str, str]) -> tuple[int, str]:
    """A client that sends everything before it reads anything."""
    with closing(http.client.HTTPConnection(*address, timeout=10)) as connection:
        connection.request("POST", "/generate", body=body, headers=headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())["type"]


def test_a_client_that_sends_all_before_it_reads_sees_why_it_was_refused() -> None:
    """Closed at once, the connection was reset and the 413 lost."""
    headers = {"content-type": "application/json"}
    with served(make_app(max_body_bytes=1024)) as address:
        for _ in range(5):
            status, kind = refused(address, b"x" * 6_000_000, headers)
            assert (status, kind) == (413, "urn:vitrine:problem:too-large")
        status, kind = refused(address, iter([b"x" * 60_000] * 100), headers)
        assert (status, kind) == (413, "urn:vitrine:problem:too-large")


@pytest.mark.parametrize(
    "sent",
    [
        b"what is this\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: here\r\nContent-Length: abc\r\n\r\n",
        b"GET / HTTP/1.1\r\nHo\0st: here\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
def test_what_is_no_request_is_a_problem_with_an_id(sent: bytes) -> None:
    with served(make_app()) as address, closing(socket.create_connection(address)) as connection:
        connection.sendall(sent)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    problem = json.loads(body)
    assert status == "HTTP/1.1 400 Bad Request"
    assert headers["content-type"] == "application/problem+json"
    assert headers["x-request-id"] == problem["instance"]
    assert (problem["status"], problem["title"]) == (400, "Bad Request")


@pytest.mark.parametrize("had_a_request", [False, True])
def test_a_request_on_its_way_while_the_server_ends_is_answered(had_a_request: bool) -> None:
    """On a connection without a request yet, and on one that is kept alive."""
    asked = b"GET /health/live HTTP/1.1\r\nHost: here\r\n\r\n"
    with (
        running(make_app(), last_word_s=5.0) as (address, server),
        closing(socket.create_connection(address)) as connection,
    ):
        if had_a_request:
            connection.sendall(asked)
            first = b""
            while not first.endswith(b'{"status":"live"}'):
                first += connection.recv(4096)
            assert first.startswith(b"HTTP/1.1 200 OK\r\n")
        server.should_exit = True
        until_refused(address)
        connection.sendall(asked)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nconnection: close\r\n" in answer


def until_refused(address: Address) -> None:
    """Until the server listens no more."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            socket.create_connection(address, timeout=1).close()
        except OSError:
            return
        time.sleep(0.005)
    raise AssertionError("the server goes on listening")


def test_an_idle_connection_is_closed_when_its_time_for_a_last_word_is_over() -> None:
    with (
        running(make_app(), last_word_s=0.3) as (address, server),
        closing(socket.create_connection(address)) as connection,
    ):
        began = time.monotonic()
        server.should_exit = True
        assert read_all(connection) == b""
        assert time.monotonic() - began >= 0.3


POST = b"POST /generate HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"


def asking(body: bytes) -> bytes:
    return POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def test_a_refusal_is_never_written_into_another_s_answer() -> None:
    """A stream runs, a second request waits behind it, and what follows is no HTTP."""
    app = create_app(ApiLimits(), FakeEngine(), make_tokenizer, "case")
    body = b'{"prompt": "a"}'
    with served(app) as address, closing(socket.create_connection(address)) as connection:
        connection.sendall(asking(body))
        first = b""
        while b"event: start" not in first:
            first += connection.recv(4096)
        connection.sendall(asking(body) + b"what is this\r\n\r\n")
        rest = read_all(connection)
    assert b"HTTP/1.1" not in rest
    assert b"problem" not in rest


def test_a_late_second_head_does_not_answer_the_first_request() -> None:
    """The first request is whole and computed; nobody may tell its client that it is not."""
    app = create_app(ApiLimits(), FakeEngine(), make_tokenizer, "case")
    with (
        served(app, head_s=0.3) as address,
        closing(socket.create_connection(address)) as connection,
    ):
        connection.sendall(asking(b'{"prompt": "a", "stream": false}') + b"GET /info HT")
        assert read_all(connection) == b""


def test_a_refused_body_has_the_id_of_its_request() -> None:
    with served(make_app()) as address, closing(socket.create_connection(address)) as connection:
        head = POST + b"X-Request-Id: mine\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(head + b"Expect: 100-continue\r\n\r\n")
        going_on = b"HTTP/1.1 100 Continue\r\n\r\n"  # the app reads the body
        assert connection.recv(len(going_on), socket.MSG_WAITALL) == going_on
        connection.sendall(b"xyz\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nx-request-id: mine\r\n" in answer
