"""Clients that leave, come back, or never read: a real server, real sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.api.sse_parser import Event, EventStreamParser
from tests.servers import Server, running_server

STORY = {"prompt": "Once upon a time", "seed": 3, "max_tokens": 300, "ignore_eos": True}
# Far more than the buffers between server and client hold.
FLOOD = STORY | {"n": 16, "logprobs": 20, "max_tokens": 450}
ALICE = {"authorization": "Bearer alice-key"}
BOB = {"authorization": "Bearer bob-key"}
SLOW_READER_S = 1.5


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two keys, and little patience."""
    folder: Path = tmp_path_factory.mktemp("streams")
    keys = folder / "keys"
    keys.write_text("alice:alice-key\nbob:bob-key\n")
    flags = ["--threads", "1", "--api-key-file", str(keys), "--slow-reader-s", str(SLOW_READER_S)]
    with running_server(folder, *flags, unhurried=True) as server:
        server.hurry()
        yield server


@contextmanager
def lingering(house: Server) -> Iterator[None]:
    house.linger()
    try:
        yield
    finally:
        house.hurry()


def read(
    server: Server, method: str, path: str, *, leave_after: int | None = None, **request: Any
) -> list[Event]:
    """Events of a stream, until its end or until we hang up. What came together with the last event
    that we wanted is then thrown away: on a fast machine that may be all the rest."""
    parser = EventStreamParser()
    events: list[Event] = []
    with httpx2.stream(method, server.url + path, timeout=60, **request) as response:
        assert response.status_code == 200, response.read()
        for data in response.iter_raw():
            events += parser.feed(data)
            if leave_after is not None and len(events) >= leave_after:
                break
    return events[:leave_after]


def begin(server: Server, request_id: str, **keywords: Any) -> list[Event]:
    """POST /generate under this id, with detach_s."""
    body = STORY | {"detach_s": 60} | keywords.pop("body", {})
    headers = ALICE | {"x-request-id": request_id}
    return read(server, "POST", "/generate", json=body, headers=headers, **keywords)


def resume(server: Server, last: str, **keywords: Any) -> list[Event]:
    """GET the events after `last`."""
    path = f"/generate/{last.rpartition(':')[0]}"
    headers = ALICE | {"last-event-id": last}
    return read(server, "GET", path, headers=headers, **keywords)


def get(server: Server, request_id: str, headers: dict[str, str]) -> httpx2.Response:
    return httpx2.get(f"{server.url}/generate/{request_id}", headers=headers, timeout=10)


def cancel(server: Server, request_id: str, headers: dict[str, str]) -> httpx2.Response:
    return httpx2.post(f"{server.url}/generate/{request_id}/cancel", headers=headers, timeout=10)


def gauges(server: Server) -> dict[str, float]:
    """All samples of /metrics, by name and labels."""
    text = httpx2.get(f"{server.url}/metrics", headers=ALICE).text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("vitrine_"): float(value) for name, _, value in lines}


def num_ended(samples: dict[str, float]) -> float:
    """Requests that ended, in whatever way."""
    ways = tuple(f"requests_{way}_total" for way in ("finished", "aborted", "failed"))
    return sum(value for name, value in samples.items() if name.startswith(ways))


def wait_until(condition: Callable[[], bool], limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        time.sleep(0.05)


def whole(events: list[Event]) -> tuple[list[int], str]:
    """Tokens and text of a stream that ended well and lacks nothing."""
    assert [e.id.rpartition(":")[2] for e in events] == [str(n) for n in range(len(events))]
    assert events[-1].type == "done"
    tokens = [i for e in events if e.type == "token" for i in e.json["token_ids"]]
    assert "".join(e.json["text"] for e in events if e.type == "token") == events[-1].json["text"]
    return tokens, events[-1].json["text"]


@pytest.fixture(scope="module")
def undisturbed(house: Server) -> tuple[list[int], str]:
    """What STORY is when nothing happens to it."""
    found = whole(begin(house, "undisturbed"))
    assert len(found[0]) == 300
    return found


def test_a_stream_that_was_left_twice_is_the_undisturbed_one(
    house: Server, undisturbed: tuple[list[int], str]
) -> None:
    with lingering(house):
        events = begin(house, "left", leave_after=10)
        time.sleep(0.3)
        events += resume(house, events[-1].id, leave_after=10)
    events += resume(house, events[-1].id)
    assert whole(events) == undisturbed
    assert read(house, "GET", "/generate/left", headers=ALICE) == events


def test_a_stream_goes_on_though_the_engine_died_between(
    house: Server, undisturbed: tuple[list[int], str]
) -> None:
    with lingering(house):
        events = begin(house, "killed", leave_after=10)
        house.engine.kill()
        events += resume(house, events[-1].id, leave_after=10)
    events += resume(house, events[-1].id)
    assert whole(events) == undisturbed


def test_only_the_key_that_made_it_may_have_it(house: Server) -> None:
    with lingering(house):
        begin(house, "mine", leave_after=3)
        for answer in (get(house, "mine", BOB), cancel(house, "mine", BOB)):
            assert answer.status_code == 404
        assert get(house, "mine", {}).status_code == 401
        assert cancel(house, "mine", ALICE).json() == {"id": "mine", "status": "cancelled"}
        assert cancel(house, "mine", ALICE).status_code == 200
    events = read(house, "GET", "/generate/mine", headers=ALICE)
    assert events[-1].json["finish_reason"] == "cancelled"
    assert events[-1].json["text"] == whole(events)[1]


def test_nobody_comes_back(house: Server) -> None:
    before = gauges(house)
    expired = 'requests_aborted_total{reason="detach-expired",route="/generate"}'
    with lingering(house):
        begin(house, "gone", leave_after=3, body={"detach_s": 0.2, "max_tokens": 450})
        wait_until(lambda: gauges(house)[expired] == before[expired] + 1)
    assert get(house, "gone", ALICE).status_code == 404
    wait_until(lambda: gauges(house)["journal_entries"] == 0)


def connect(server: Server, body: dict[str, Any], headers: dict[str, str]) -> socket.socket:
    """Send a request and read nothing; with a buffer of our own that is as small as can be."""
    data = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    lines = [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(["POST /generate HTTP/1.1", "host: test", *lines])
    head += f"\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    return client


def drain(client: socket.socket) -> None:
    """Read whatever comes until there is no more."""
    client.settimeout(10)
    while client.recv(2**20):
        pass


def test_a_client_that_never_reads_is_cut_off(house: Server) -> None:
    before = gauges(house)
    with closing(connect(house, FLOOD, ALICE)) as client:
        wait_until(lambda: gauges(house)["slow_readers_total"] == before["slow_readers_total"] + 1)
        after = gauges(house)
        assert after["journal_entries"] == 0
        assert after["requests_in_flight"] == 0
        assert num_ended(after) == num_ended(before) + 1
        with pytest.raises(ConnectionResetError):
            drain(client)


def test_one_that_reads_slowly_is_not(house: Server) -> None:
    """It takes less than all that waits, but it takes something: it gets all in the end."""
    before = gauges(house)["slow_readers_total"]
    received = b""
    with closing(connect(house, FLOOD | {"max_tokens": 60}, ALICE)) as client:
        client.settimeout(20)
        slow_until = time.monotonic() + 3 * SLOW_READER_S
        while time.monotonic() < slow_until:
            received += client.recv(2_000)
            time.sleep(0.1)
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += client.recv(2**20)
    assert gauges(house)["slow_readers_total"] == before
    assert received.count(b"event: done") == 16


def test_a_client_that_never_reads_does_not_keep_the_server_from_ending(tmp_path: Path) -> None:
    with running_server(tmp_path, "--drain-s", "1", "--threads", "1") as server:
        with closing(connect(server, FLOOD, {})), closing(connect(server, STORY, {})):
            wait_until(lambda: gauges(server)["requests_in_flight"] == 2)
            time.sleep(1.5)
            began = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - began < 8
        log = server.log.read_text()
        assert "Traceback" not in log
        assert " ERROR " not in log


def test_after_all_this_nothing_is_left(house: Server) -> None:
    """Blocks, journal, requests, tasks, connections: as before the first request."""

    def is_empty() -> bool:
        now = gauges(house)
        return (
            now["journal_entries"] == now["requests_in_flight"] == 0
            and now['kv_blocks{state="referenced"}'] == 0
            and now["http_connections"] == 1  # the one that asks
            and now["asyncio_tasks"] < 12
        )

    wait_until(is_empty)
    now = gauges(house)
    accepted = [v for name, v in now.items() if name.startswith("requests_accepted_total")]
    assert sum(accepted) == num_ended(now) > 0
