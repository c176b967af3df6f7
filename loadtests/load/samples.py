"""Raw measurements, a line of JSON a stream: Locust's own statistics are rounded to two digits.

Moments are CLOCK_MONOTONIC in ns, which all processes of one machine share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from io import TextIOWrapper
from pathlib import Path


@dataclass(slots=True)
class Sample:
    """One request. `due_ns` is when it should have been sent: in a closed loop when it was."""

    route: str
    due_ns: int
    sent_ns: int  # it had its connection
    connect_ns: int = 0  # that took so long to make; 0: it was there
    id: str = ""
    status: int = 0
    first_ns: int | None = None  # its first token was here
    end_ns: int | None = None  # its stream had ended
    stamps_ns: list[int] = field(default_factory=list)  # of every event with tokens
    counts: list[int] = field(default_factory=list)  # tokens of each
    num_tokens: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    finish_reason: str = ""
    was_cut: bool = False  # the run ended before it did
    failure: str = ""
    timing: dict[str, float | None] = field(default_factory=dict)  # the server's own

    @property
    def ttft_s(self) -> float | None:
        """From when it was due to its first token."""
        return None if self.first_ns is None else (self.first_ns - self.due_ns) / 1e9

    @property
    def answered_s(self) -> float | None:
        """The same from when its bytes could be sent: what a server can know of."""
        return None if self.first_ns is None else (self.first_ns - self.sent_ns) / 1e9

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first event; None where all came in one."""
        if len(self.stamps_ns) < 2:
            return None
        tokens = sum(self.counts[1:])
        return (self.stamps_ns[-1] - self.stamps_ns[0]) / 1e9 / tokens if tokens else None

    @property
    def e2el_s(self) -> float | None:
        """From when it was due to the end of its stream."""
        return None if self.end_ns is None else (self.end_ns - self.due_ns) / 1e9

    @property
    def gaps_s(self) -> list[float]:
        """The pauses a reader sees: between events with tokens."""
        pairs = zip(self.stamps_ns, self.stamps_ns[1:], strict=False)
        return [(later - earlier) / 1e9 for earlier, later in pairs]


class SampleFile:
    """Appends to a file of this process's own in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._pid = 0
        self._file: TextIOWrapper | None = None

    def write(self, sample: Sample) -> None:
        """One line; a process forked from this one gets a file of its own."""
        if self._file is None or self._pid != os.getpid():
            self._pid = os.getpid()
            path = self._folder / f"samples-{self._pid}.jsonl"
            self._file = path.open("a", buffering=1 << 20)
        line = {one.name: getattr(sample, one.name) for one in fields(sample)}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Everything is on disk afterwards."""
        if self._file is not None and self._pid == os.getpid():
            self._file.close()
        self._file = None


def read_samples(folder: Path) -> list[Sample]:
    """All of a run, of every process, in the order they were due."""
    lines: Iterable[str] = (
        line
        for path in sorted(folder.glob("samples-*.jsonl"))
        for line in path.read_text().splitlines()
    )
    return sorted((Sample(**json.loads(line)) for line in lines), key=lambda one: one.due_ns)
