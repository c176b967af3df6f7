"""The steps of a report: each writes one JSON file, and one whose file is there is not done again.

A file holds the settings it was made with; other settings make it anew. A long step keeps parts of
its own, so that an interruption costs one measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")
Say = Callable[[str], None]


class _Kept(msgspec.Struct):
    key: dict[str, object]
    result: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Doing:
    """What a step is given: `say` tells what it is at, `earlier` has the results of the steps
    before it by their places."""

    say: Say
    earlier: Mapping[str, Any]
    folder: Path
    name: str
    key: dict[str, object]

    def part(self, name: str, kind: type[T], make: Callable[[], T]) -> T:
        """A part of the step, kept by itself."""
        part = Step(f"{self.name}-{name}", self.key, kind, lambda _: make(), 0.0)
        return part.result(self.folder, self.say, self.earlier)


@dataclass(frozen=True, slots=True)
class Step(Generic[T]):
    """`make` measures. `weight_s`: about how long it takes; `num_parts`: about how many parts that
    are kept by themselves it has."""

    name: str
    key: dict[str, object]
    kind: type[T]
    make: Callable[[Doing], T]
    weight_s: float
    num_parts: int = 0

    def path(self, folder: Path) -> Path:
        """Where its result is kept."""
        return folder / f"{self.name}.json"

    def kept(self, folder: Path) -> T | None:
        """The result of an earlier run with the same settings."""
        held = _read(self.path(folder))
        if held is None or held.key != _plain(self.key):
            return None
        try:
            return msgspec.json.decode(held.result, type=self.kind)
        except msgspec.DecodeError:
            return None

    def left_s(self, folder: Path) -> float:
        """About how long it still takes, with what is kept of it."""
        if self.kept(folder) is not None:
            return 0.0
        parts = [_read(path) for path in folder.glob(f"{self.name}-*.json")]
        done = sum(part is not None and part.key == _plain(self.key) for part in parts)
        return self.weight_s * (1 - min(1.0, done / self.num_parts) if self.num_parts else 1.0)

    def result(self, folder: Path, say: Say, earlier: Mapping[str, Any]) -> T:
        """Kept or measured now."""
        found = self.kept(folder)
        if found is None:
            say(self.name)
            found = self.make(Doing(say, earlier, folder, self.name, self.key))
            folder.mkdir(parents=True, exist_ok=True)
            beside = self.path(folder).with_suffix(".part")
            beside.write_bytes(msgspec.json.encode({"key": self.key, "result": found}))
            beside.replace(self.path(folder))
        return found


def _read(path: Path) -> _Kept | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.DecodeError):
        return None


def _plain(key: dict[str, object]) -> object:
    """As it comes back from JSON."""
    return msgspec.json.decode(msgspec.json.encode(key))
