"""Messages over a stream that comes in pieces, and the two ends of the engine's socket."""

from __future__ import annotations

import asyncio
import io
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.channel import Channel, ChannelClosedError
from service.engine.messages import MAX_MESSAGE_BYTES
from service.engine_link import EngineLink
from service.frames import LENGTH, FrameReader, FrameTooLongError, frame, read_frame

LIMIT = 100


@given(st.lists(st.binary(max_size=LIMIT)), st.data())
def test_messages_come_out_as_they_went_in_however_they_are_cut(
    messages: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(map(frame, messages))
    reader, came, place = FrameReader(LIMIT), [], 0
    while place < len(stream):
        length = data.draw(st.integers(1, len(stream) - place))
        came += reader.feed(stream[place : place + length])
        place += length
        assert came == messages[: len(came)]
    assert came == messages


@given(st.lists(st.binary(max_size=LIMIT)), st.integers(0, 8))
def test_blocking_reads_end_with_the_stream(messages: list[bytes], num_missing: int) -> None:
    whole = b"".join(map(frame, messages))
    stream = io.BytesIO(whole[: len(whole) - num_missing])
    came = []
    while (message := read_frame(stream)) is not None:
        came.append(message)
    assert came == messages[: len(came)]
    if not num_missing:
        assert came == messages


def test_what_is_too_long_is_refused_before_it_is_there() -> None:
    reader = FrameReader(LIMIT)
    assert reader.feed(frame(b"x" * LIMIT)) == [b"x" * LIMIT]
    with pytest.raises(FrameTooLongError, match=r"101 bytes .* the limit is 100"):
        reader.feed(LENGTH.pack(LIMIT + 1))


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """The engine's end, and a bare socket at the API's."""
    its, ours = socket.socketpair()
    channel = Channel(its)
    with ours:
        yield channel, ours
        channel.close(0.0)


def test_a_message_wakes_who_waits(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    assert not channel.poll(0)
    began = time.monotonic()
    assert not channel.poll(30)
    assert time.monotonic() - began >= 0.029
    other.sendall(frame(b"one") + frame(b"two")[:5])
    assert channel.poll(10_000)
    assert channel.receive() == b"one"
    assert not channel.poll(0), "half a message was taken for one"
    other.sendall(frame(b"two")[5:])
    assert channel.receive() == b"two"


def test_who_does_not_read_holds_nobody_up_and_loses_nothing(
    pair: tuple[Channel, socket.socket],
) -> None:
    channel, other = pair
    messages = [bytes([number % 256]) * 10_000 for number in range(300)]  # 3 MB: no buffer's size
    began = time.monotonic()
    for message in messages:
        channel.send(message)
    assert time.monotonic() - began < 5.0
    reader, came = FrameReader(MAX_MESSAGE_BYTES), []
    while len(came) < len(messages):
        channel.poll(0)  # what a step does: what was kept goes out
        came += reader.feed(other.recv(1 << 20))
    assert came == messages


def test_last_messages_leave_before_it_closes(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    channel.send(b"last words")
    channel.close(linger_s=1.0)
    assert FrameReader(LIMIT).feed(other.recv(1000)) == [b"last words"]
    assert other.recv(1000) == b""


def test_nobody_at_the_other_end_is_told_to_who_looks(
    pair: tuple[Channel, socket.socket],
) -> None:
    channel, other = pair
    other.sendall(frame(b"the last"))
    other.close()
    channel.send(b"to nobody")
    assert channel.poll(0)
    assert channel.receive() == b"the last"
    with pytest.raises(ChannelClosedError):
        channel.poll(0)
    with pytest.raises(ChannelClosedError):
        channel.receive()


class Heard:
    """Notes what a link tells."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.ends: list[str] = []
        self.ended = asyncio.Event()

    def heard(self, message: bytes) -> None:
        self.messages.append(message)

    def hung_up(self, error: str) -> None:
        self.ends.append(error)
        self.ended.set()


async def test_the_link_hears_all_that_was_said_before_the_end() -> None:
    its, ours = socket.socketpair()
    heard = Heard()
    link = await EngineLink.open(ours, heard)
    link.send(b"hello")
    channel = Channel(its)
    assert await asyncio.to_thread(channel.receive) == b"hello"
    long = b"x" * 5_000_000
    channel.send(b"short")
    channel.send(long)
    await asyncio.to_thread(channel.close, 5.0)
    async with asyncio.timeout(5):
        await heard.ended.wait()
    assert heard.messages == [b"short", long]
    assert heard.ends == [""]
    link.send(b"nobody is there")
    link.close()


async def test_what_a_dead_engine_had_said_is_heard_though_a_write_fails_first() -> None:
    its, ours = socket.socketpair()
    heard = Heard()
    link = await EngineLink.open(ours, heard)
    with its:
        its.sendall(frame(b"last words"))
    link.send(b"to nobody")  # before the event loop had a moment to read
    async with asyncio.timeout(5):
        await heard.ended.wait()
    assert heard.messages == [b"last words"]
    assert heard.ends == [""]


async def test_the_link_ends_at_a_message_over_the_limit() -> None:
    its, ours = socket.socketpair()
    heard = Heard()
    await EngineLink.open(ours, heard)
    with its:
        its.sendall(frame(b"fine") + LENGTH.pack(MAX_MESSAGE_BYTES + 1) + b"...")
        async with asyncio.timeout(5):
            await heard.ended.wait()
    assert len(heard.ends) == 1
    assert "67,108,865 bytes" in heard.ends[0]


async def test_a_link_closed_from_here_says_nothing() -> None:
    its, ours = socket.socketpair()
    heard = Heard()
    link = await EngineLink.open(ours, heard)
    link.close()
    with its:
        await asyncio.sleep(0.05)
        assert its.recv(10) == b""
    assert heard.ends == []
