"""Server-sent events, as the standard has a client read them (WHATWG HTML, 9.2.6)."""

from __future__ import annotations

from dataclasses import dataclass

END = b"\n\n"


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `data` has its lines joined with LF; None: there was none, a comment."""

    id: str
    name: str
    data: bytes | None


def parse(block: bytes) -> Event:
    """The lines up to an empty one."""
    event_id, name, data = "", "message", []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode()
        elif field == b"id":
            event_id = value.decode()
    return Event(event_id, name, b"\n".join(data) if data else None)
