"""What a benchmark's numbers were measured on, and whether it was quiet.

Linux tells in /proc; elsewhere the answers are None.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

STAT = Path("/proc/stat")
STATUS = Path("/proc/self/status")
CPU_INFO = Path("/proc/cpuinfo")
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and the libraries."""

    cpu: str
    cores: int  # that this process may use
    device: str  # the GPU's name, or cpu
    platform: str
    python: str
    torch: str
    load_average: float | None  # of the last minute, before the benchmark


def describe_machine(device: torch.device) -> Machine:
    """The machine this process runs on."""
    cuda = device.type == "cuda"
    return Machine(
        cpu=_cpu_model(),
        cores=_num_cores(),
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        platform=platform.platform(terse=True),
        python=platform.python_version(),
        torch=str(torch.__version__),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def _cpu_model() -> str:
    for line in _lines(CPU_INFO):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reset_peak_memory() -> None:
    """Forget the largest resident size so far, where the system can (Linux)."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Largest resident size of this process since it began or since the reset."""
    for line in _lines(STATUS):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class CpuWatch:
    """How many processors the rest of the machine kept busy since this was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._busy_s = _machine_busy_s()
        self._own_s = time.process_time()

    def foreign_cores(self) -> float | None:
        """None where the system does not tell. The kernel counts in hundredths of a second."""
        busy_s = _machine_busy_s()
        if busy_s is None or self._busy_s is None:
            return None
        foreign_s = (busy_s - self._busy_s) - (time.process_time() - self._own_s)
        return max(0.0, foreign_s / max(time.perf_counter() - self._began, 1e-9))


def _machine_busy_s() -> float | None:
    """Processor time spent by everyone since boot: user to softirq and steal, not idle and
    not waiting for a disk (proc(5))."""
    for line in _lines(STAT):
        if line.startswith("cpu "):
            ticks = [int(word) for word in line.split()[1:9]]
            return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
