"""The steps of a report: each writes one JSON file, and one whose file is there is not done again.

A file holds the settings it was made with; other settings make it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")
Say = Callable[[str], None]


class _Kept(msgspec.Struct):
    key: dict[str, object]
    result: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Step(Generic[T]):
    """`make(say)` measures; `say` tells what it is at. `weight_s`: about how long it takes."""

    name: str
    key: dict[str, object]
    kind: type[T]
    make: Callable[[Say], T]
    weight_s: float

    def path(self, folder: Path) -> Path:
        """Where its result is kept."""
        return folder / f"{self.name}.json"

    def kept(self, folder: Path) -> T | None:
        """The result of an earlier run with the same settings."""
        try:
            held = msgspec.json.decode(self.path(folder).read_bytes(), type=_Kept)
            if held.key != _plain(self.key):
                return None
            return msgspec.json.decode(held.result, type=self.kind)
        except (OSError, msgspec.DecodeError):
            return None

    def result(self, folder: Path, say: Say) -> T:
        """Kept or measured now."""
        found = self.kept(folder)
        if found is None:
            say(self.name)
            found = self.make(lambda what: say(f"{self.name}: {what}"))
            folder.mkdir(parents=True, exist_ok=True)
            held = {"key": self.key, "result": found}
            beside = self.path(folder).with_suffix(".part")
            beside.write_bytes(msgspec.json.encode(held))
            beside.replace(self.path(folder))
        return found


def _plain(key: dict[str, object]) -> object:
    """As it comes back from JSON."""
    return msgspec.json.decode(msgspec.json.encode(key))
