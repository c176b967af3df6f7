"""Which CPU the calling thread is on. Linux; elsewhere nobody says."""

from __future__ import annotations

import ctypes
import sys


def this_cpu() -> int | None:
    """Its number, as in `os.sched_getaffinity`; a moment later it may be another."""
    if _sched_getcpu is None:
        return None
    number: int = _sched_getcpu()
    return number if number >= 0 else None


# sched_getcpu(3), which `os` does not have.
_sched_getcpu = (
    getattr(ctypes.PyDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None
)
