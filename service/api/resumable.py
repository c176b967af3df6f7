"""Requests that live on after their client is gone: every event is kept, and a client that
comes back gets those it has not seen, the same bytes under the same numbers, and then goes on.

What is kept is bounded twice: how many requests, and how many bytes for each.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from service.api.errors import ProblemError, retry_after
from service.api.event_writer import EventWriter
from service.api.recent import RequestKey
from service.metrics import AbortReason

log = logging.getLogger(__name__)

# While nobody takes the events, they are made so often: many tokens in each, few to keep.
UNREAD_EVENTS_S = 0.25
MAX_CHUNK_BYTES = 64 * 1024  # of a replay, for one send
TAKEN_OVER = b": another connection goes on with this stream\n\n"


class ResumableStream:
    """The events of one request, and the one client that reads them, if there is one."""

    def __init__(
        self, writer: EventWriter, detach_s: float, max_bytes: int, on_expiry: Callable[[], None]
    ) -> None:
        """`on_expiry` is called when nobody came for `detach_s`; the request has ended then."""
        self.events: list[bytes] = []  # event number n is events[n]
        self.num_bytes = 0
        self.has_ended = False  # the last event is there
        self.is_delivered = False  # it was handed to a client, as far as a server can know
        self._writer = writer
        self._detach_s = detach_s
        self._max_bytes = max_bytes
        self._on_expiry = on_expiry
        self._reader: Attachment | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()  # for the reader
        self._taken = asyncio.Event()  # for the recorder

    @property
    def is_attached(self) -> bool:
        return self._reader is not None

    @property
    def expires_at_s(self) -> float | None:
        """When it is forgotten, on the event loop's clock; None while a client reads."""
        return None if self._expiry is None else self._expiry.when()

    def attach(self, after: int) -> Attachment:
        """Give the events after number `after` (-1: all) to a client, in place of the one that
        reads now: that one is most often a connection that died without a word."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self._reader = Attachment(self, after + 1)
        self._news.set()
        self._taken.set()
        return self._reader

    def forget(self) -> None:
        """End the request if it runs, and let go of what was kept."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self._writer.generation.abort("detach-expired")

    async def record(self) -> None:
        """Keep the events until the last; runs as a task of its own."""
        try:
            while events := await self._writer.next_events():
                self._keep(events)
                await self._until_taken()
        except Exception:
            log.exception("request %s: its events broke off", self._writer.generation.plan.key[1])
        finally:
            self._writer.generation.abort()
            self.has_ended = True
            self._news.set()

    def _keep(self, events: list[bytes]) -> None:
        self.events += events
        self.num_bytes += sum(map(len, events))
        self._news.set()
        if self.num_bytes > self._max_bytes:
            self._writer.generation.fail(
                ProblemError(
                    "detach-limit",
                    507,
                    f"the events of this request take {self.num_bytes} bytes; with detach_s the "
                    f"limit is {self._max_bytes}, without it there is none",
                    field="detach_s",
                )
            )

    async def _until_taken(self) -> None:
        """Wait until the client took what there is, but not long: text must be looked through
        for stop strings though nobody reads it."""
        self._taken.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(UNREAD_EVENTS_S):
                await self._taken.wait()

    async def next_chunk(self, reader: Attachment) -> bytes | None:
        """What `reader` has not had yet, at least one event; None when there is no more."""
        while True:
            if reader is not self._reader:
                return reader.say_once(TAKEN_OVER)
            if reader.position < len(self.events):
                return self._chunk_for(reader)
            if self.has_ended:
                self.is_delivered = True
                return None
            self._news.clear()
            await self._news.wait()

    def _chunk_for(self, reader: Attachment) -> bytes:
        first = end = reader.position
        size = 0
        while end < len(self.events) and (end == first or size < MAX_CHUNK_BYTES):
            size += len(self.events[end])
            end += 1
        reader.position = end
        if end == len(self.events):
            self._taken.set()
        return b"".join(self.events[first:end])

    def detach(self, reader: Attachment) -> None:
        """`reader` is gone; does nothing if another took its place."""
        if reader is self._reader:
            self._reader = None
            loop = asyncio.get_running_loop()
            self._expiry = loop.call_later(self._detach_s, self._on_expiry)


class Attachment:
    """A client that reads a resumable stream."""

    def __init__(self, stream: ResumableStream, position: int) -> None:
        self.position = position  # number of the next event it gets
        self._stream = stream
        self._has_said = False

    async def next_chunk(self) -> bytes | None:
        """The bytes of the next events; None after the last, or when another took over."""
        return await self._stream.next_chunk(self)

    def close(self, reason: AbortReason) -> None:
        """The client is gone; whatever the reason, it may come back."""
        self._stream.detach(self)

    def say_once(self, comment: bytes) -> bytes | None:
        """`comment` the first time, then None."""
        if self._has_said:
            return None
        self._has_said = True
        return comment


class ResumableStreams:
    """All that are kept, by owner and request id."""

    def __init__(self, max_streams: int, max_bytes: int) -> None:
        """`max_bytes` is the limit of each."""
        self._max_streams = max_streams
        self._max_bytes = max_bytes
        self._streams: dict[RequestKey, ResumableStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio keeps only weak references

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def num_bytes(self) -> int:
        """What all of them keep."""
        return sum(stream.num_bytes for stream in self._streams.values())

    def find(self, key: RequestKey) -> ResumableStream | None:
        return self._streams.get(key)

    def make_room(self) -> None:
        """Raise `ProblemError` (429) when no other request can be kept. Those that were
        delivered to the end are forgotten first, the oldest of them first."""
        if len(self._streams) < self._max_streams:
            return
        for key, stream in self._streams.items():
            if stream.is_delivered and not stream.is_attached:
                self._forget(key)
                return
        loop = asyncio.get_running_loop()
        ends = [one.expires_at_s for one in self._streams.values() if one.expires_at_s is not None]
        raise ProblemError(
            "too-many-detachable",
            429,
            f"{len(self._streams)} requests with detach_s are kept; the limit is "
            f"{self._max_streams}",
            field="detach_s",
            headers=retry_after(min(ends, default=loop.time()) - loop.time()),
        )

    def add(self, writer: EventWriter, detach_s: float) -> ResumableStream:
        """Keep a request that was just admitted, after `make_room`."""
        key = writer.generation.plan.key
        stream = ResumableStream(writer, detach_s, self._max_bytes, lambda: self._forget(key))
        self._streams[key] = stream
        task = asyncio.create_task(stream.record())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def _forget(self, key: RequestKey) -> None:
        self._streams.pop(key).forget()
