"""Keeps the API process off the core on which the engine's main thread runs.

Where the engine computes with as many threads as there are cores, everybody waits for its main
thread: between two forwards it alone works, and the core of another is free. The system does not
know that. It wakes the API where the message came from, on that very core (loadtests/NOTES.md). So
the message says which it is (`StepOutput.cpu`), and the API leaves it. Linux; elsewhere nothing is
done.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("vitrine.engine")


class OwnCore:
    """Has this process step aside."""

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
        self._avoided: int | None = None

    @property
    def count(self) -> int:
        """Cores that this process was given."""
        return len(self._cores)

    def leave(self, core: int | None) -> None:
        """Run on other cores than this from now on, if there are others. None: nobody says."""
        if len(self._cores) < 2 or core is None or core == self._avoided:
            return
        self._run_on(self._cores - {core})
        self._avoided = core

    def leave_none(self) -> None:
        """Run anywhere. To be called before a process is started that is to have all cores: it
        inherits what this one may."""
        if self._avoided is not None and self._cores:
            self._run_on(self._cores)
            self._avoided = None

    def _run_on(self, cores: set[int]) -> None:
        """All threads: what one of them starts inherits where it may run. Where the system does
        not let us, or took cores away, all stays as it is."""
        try:
            for thread in Path("/proc/self/task").iterdir():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), cores)
        except OSError as error:
            log.warning("the API process stays where the system puts it: %s", error)
            self._cores = set()
