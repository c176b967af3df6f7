"""Framing against a spec-following parser; the response against clients that misbehave."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.sse import EventStreamResponse, format_event
from tests.api.asgi_client import Exchange
from tests.api.sse_parser import Event, EventStreamParser, parse

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), max_size=20)


@given(st.lists(st.tuples(texts, texts)), st.lists(st.integers(1, 20)))
def test_json_events_arrive_as_they_were_sent(
    pairs: list[tuple[str, str]], cuts: list[int]
) -> None:
    """Whatever is in the texts, and however the network cuts the bytes."""
    stream = b"".join(
        format_event(f"r:{number}", "token", json.dumps(pair, ensure_ascii=False).encode())
        for number, pair in enumerate(pairs)
    )
    parser = EventStreamParser()
    events: list[Event] = []
    at = 0
    for size in [*cuts, len(stream)]:
        events += parser.feed(stream[at : at + size])
        at += size
    assert [tuple(event.json) for event in events] == pairs
    assert [event.id for event in events] == [f"r:{n}" for n in range(len(pairs))]
    assert {event.type for event in events} <= {"token"}


@given(lines, lines.filter(bool), texts)
def test_any_data_arrives_with_its_line_ends_as_lf(event_id: str, name: str, data: str) -> None:
    received = parse(format_event(event_id, name, data.encode()))
    assert received == [Event(name, data.replace("\r\n", "\n").replace("\r", "\n"), event_id)]


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b"])
def test_an_id_or_name_of_two_lines_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="one line"):
        format_event(bad, "token", b"{}")
    with pytest.raises(ValueError, match="one line"):
        format_event("1", bad, b"{}")


class Source:
    """Chunks for a response, and what the response did with it."""

    def __init__(self, chunks: list[bytes], *, wait_after: bool = False) -> None:
        self.chunks = chunks
        self.wait_after = wait_after
        self.closed = 0
        self.reason = ""
        self.cancelled = False

    async def next_chunk(self) -> bytes | None:
        if self.chunks:
            return self.chunks.pop(0)
        if self.wait_after:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        return None

    def close(self, reason: str) -> None:
        self.closed += 1
        self.reason = reason

    def response(self, keep_alive_s: float = 15.0) -> EventStreamResponse:
        return EventStreamResponse(self.next_chunk, self.close, keep_alive_s)


EVENT = format_event("r:0", "token", b"{}")


async def test_a_stream_from_start_to_end() -> None:
    source = Source([EVENT, EVENT + EVENT])
    exchange = Exchange(source.response())
    assert len(await exchange.finish()) == 3
    assert exchange.status == 200
    assert exchange.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert exchange.headers["cache-control"] == "no-cache"
    assert exchange.headers["x-accel-buffering"] == "no"
    assert source.closed == 1


async def test_a_client_that_goes_away_while_nothing_comes() -> None:
    source = Source([EVENT], wait_after=True)
    exchange = Exchange(source.response())
    await exchange.until_events(1)
    assert source.closed == 0
    exchange.disconnect()
    await exchange.finish()
    assert source.closed == 1
    assert source.cancelled


async def test_a_client_that_stops_reading_and_goes_away() -> None:
    source = Source([EVENT] * 100)
    exchange = Exchange(source.response())
    exchange.may_send.clear()
    await exchange.until(lambda: exchange.sends_waiting == 1)
    exchange.disconnect()
    await exchange.finish()
    assert source.closed == 1
    assert len(source.chunks) >= 98  # it was not read ahead


async def test_a_server_that_reports_the_disconnect_by_an_oserror() -> None:
    source = Source([EVENT])

    async def send(message: object) -> None:
        raise OSError("gone")

    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    await source.response()({"type": "http"}, receive, send)  # type: ignore[arg-type]
    assert source.closed == 1


async def test_a_failing_source_closes_and_is_not_hidden() -> None:
    closed: list[str] = []

    async def broken() -> bytes | None:
        raise RuntimeError("broken source")

    exchange = Exchange(EventStreamResponse(broken, closed.append, 15))
    with pytest.raises(RuntimeError, match="broken source"):
        await exchange.finish()
    assert closed == ["client-gone"]


async def test_a_cancelled_response_closes() -> None:
    """The server shuts down."""
    source = Source([EVENT], wait_after=True)
    exchange = Exchange(source.response())
    await exchange.until_events(1)
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.task
    assert source.closed == 1
    assert source.cancelled


async def test_keep_alive_when_nothing_comes() -> None:
    source = Source([EVENT], wait_after=True)
    exchange = Exchange(source.response(keep_alive_s=0.02))
    await exchange.until(lambda: len(exchange.comments) >= 3)
    assert set(exchange.comments) == {" keep-alive"}
    assert len(exchange.events) == 1
    exchange.disconnect()
    await exchange.finish()


async def test_no_keep_alive_between_events_that_come() -> None:
    chunks = [EVENT] * 10

    async def next_chunk() -> bytes | None:
        await asyncio.sleep(0.01)
        return chunks.pop() if chunks else None

    exchange = Exchange(EventStreamResponse(next_chunk, lambda _: None, 0.5))
    assert len(await exchange.finish()) == 10
    assert exchange.comments == []


async def test_keep_alives_do_not_pile_up_before_a_client_that_does_not_read() -> None:
    source = Source([EVENT] * 3, wait_after=True)
    exchange = Exchange(source.response(keep_alive_s=0.01))
    exchange.may_send.clear()
    await asyncio.sleep(0.1)
    assert exchange.sends_waiting == 1
    exchange.disconnect()
    await exchange.finish()
    assert source.closed == 1
