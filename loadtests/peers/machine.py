"""What this machine is and whether somebody else is using it. Linux only; elsewhere nothing
is known, and said so."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

STAT = Path("/proc/stat")
CPUINFO = Path("/proc/cpuinfo")
QUIET_CORES = 0.10
LOOK_S = 2.0


def busy_s() -> float | None:
    """CPU seconds that all processes, and the host stealing from us, have used since boot."""
    if not STAT.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (
        int(field) for field in STAT.read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(limit_s: float, say: Callable[[str], None]) -> bool:
    """Until the machine has used under a tenth of a core for two seconds; False when that
    did not happen within `limit_s`."""
    deadline = time.monotonic() + limit_s
    told = False
    while (before := busy_s()) is not None:
        time.sleep(LOOK_S)
        used = ((busy_s() or 0.0) - before) / LOOK_S
        if used < QUIET_CORES:
            return True
        if time.monotonic() > deadline:
            return False
        if not told:
            say(f"waiting up to {limit_s:.0f} s: others use {used:.1f} cores")
            told = True
    return True


def processor() -> str:
    """Name of the processor, in its own words."""
    if CPUINFO.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def label() -> str:
    """A folder name for results: cores and processor."""
    return re.sub(r"[^a-z0-9]+", "-", f"{num_cores()}x {processor()}".lower()).strip("-")


def commit() -> str:
    """The commit of this repository, with + when files differ from it."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
