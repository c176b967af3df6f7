"""The flight recorder: which sequences the step that runs computes, readable after a crash.

A small file in a folder of the engine process, mapped into its memory: writing costs a microsecond
and no message, and what was written outlives the process. The API reads it when an engine
died, so that only the sequences of the fatal step are held to account.

Layout, native 8-byte integers: number of ids (0: nothing runs), then the ids.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

FILE_NAME = "step"
MAX_IDS = 2 * 4096 + 1  # of two steps at once, with the highest --max-num-seqs, and a guest
_NUMBER = struct.Struct("=q")


def create(folder: Path) -> None:
    """An empty record."""
    with (folder / FILE_NAME).open("wb") as file:
        file.truncate(_NUMBER.size * (1 + MAX_IDS))


def read(folder: Path) -> frozenset[int]:
    """Ids of the step that ran at the end; empty when none did, or nothing was recorded."""
    try:
        data = (folder / FILE_NAME).read_bytes()
    except FileNotFoundError:
        return frozenset()
    (count,) = _NUMBER.unpack_from(data)
    return frozenset(struct.unpack_from(f"={count}q", data, _NUMBER.size))


class Recorder:
    """The engine's end."""

    def __init__(self, folder: Path) -> None:
        with (folder / FILE_NAME).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._ids: Sequence[int] = ()  # of steps
        self._written: list[int] = []  # what lies behind the number, which may be less by now

    def begin(self, ids: Sequence[int]) -> None:
        """These sequences are computed from now on; none when there are no ids."""
        self._ids = ids
        self._write(ids)

    def begin_guest(self, guest_id: int) -> None:
        """A guest is computed, and whatever steps are under way on the device go on."""
        self._write([*self._ids, guest_id])

    def end_guest(self) -> None:
        """Only the steps are left."""
        self._write(self._ids)

    def _write(self, ids: Sequence[int]) -> None:
        count = len(ids)
        if self._written[:count] != ids:  # steps one after another are mostly of the same
            # A kill between the writes finds no step rather than a wrong one.
            _NUMBER.pack_into(self._map, 0, 0)
            struct.pack_into(f"={count}q", self._map, _NUMBER.size, *ids)
            self._written[:count] = ids
        _NUMBER.pack_into(self._map, 0, count)
