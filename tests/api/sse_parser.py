"""A client's side of server-sent events, written after the standard (WHATWG HTML, section
9.2.6 "Interpreting an event stream"), so that what we frame is read by someone else's rules."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    type: str
    data: str
    id: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class EventStreamParser:
    """Feed bytes in any chunks; get the events that they complete."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._buffer = ""
        self._first = True
        self._data: list[str] = []
        self._type = ""
        self._id = ""
        self.comments: list[str] = []

    def feed(self, data: bytes) -> list[Event]:
        text = self._decoder.decode(data)
        if self._first and text:
            text, self._first = text.removeprefix("\ufeff"), False
        self._buffer += text
        events = []
        while (line := self._next_line()) is not None:
            event = self._line(line)
            if event is not None:
                events.append(event)
        return events

    def _next_line(self) -> str | None:
        ends = [at for at in (self._buffer.find("\n"), self._buffer.find("\r")) if at >= 0]
        if not ends:
            return None
        end = min(ends)
        if self._buffer[end] == "\r":
            if end + 1 == len(self._buffer):
                return None  # an LF may belong to it
            after = end + 2 if self._buffer[end + 1] == "\n" else end + 1
        else:
            after = end + 1
        line, self._buffer = self._buffer[:end], self._buffer[after:]
        return line

    def _line(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        if line.startswith(":"):
            self.comments.append(line[1:])
            return None
        name, colon, value = line.partition(":")
        value = value.removeprefix(" ") if colon else ""
        if name == "event":
            self._type = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = value
        return None

    def _dispatch(self) -> Event | None:
        data, kind = self._data, self._type
        self._data, self._type = [], ""
        return Event(kind or "message", "\n".join(data), self._id) if data else None


def parse(data: bytes) -> list[Event]:
    return EventStreamParser().feed(data)
