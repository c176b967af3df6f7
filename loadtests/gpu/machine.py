"""What the machine is, and what its clocks do while a part runs: from nvidia-smi, which needs none
of our libraries. The process that drives a run holds no memory of the GPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

Json = dict[str, Any]

CLOCKS = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,"
    "temperature.gpu,memory.used,persistence_mode,clocks_throttle_reasons.active"
)
SAMPLE_S = 2.0
SAMPLED = "clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu,memory.used"
PACKAGES = ("torch", "triton", "transformers", "numpy", "msgspec", "vitrine")
# In a process of its own: a CUDA context stays until its process ends.
PROBE = """
import json, torch
if not torch.cuda.is_available():
    raise SystemExit("no GPU that torch can use")
p = torch.cuda.get_device_properties(0)
print(json.dumps({
    "gpu": p.name, "memory_gib": round(p.total_memory / 2**30, 1),
    "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
    "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
}))
"""


def probe() -> Json:
    """The GPU as torch sees it. Raises `SystemExit` where there is none."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["torch does not start"])[-1]
        raise SystemExit(f"{reason}; --dry-run runs every part on the CPU")
    found: Json = json.loads(done.stdout)
    return found


def clocks() -> str | None:
    """Clocks, power and temperature at the moment."""
    return _output(["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"])


def versions(root: Path) -> dict[str, str]:
    """Of what runs, and how many processors it may use."""
    found = {"python": platform.python_version(), "cpus": str(len(os.sched_getaffinity(0)))}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    commit = _output(["git", "-C", str(root), "rev-parse", "--short", "HEAD"])
    return found | {"commit": commit or "unknown"}


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


class ClockWatch:
    """Samples every other second between `with` and its end."""

    def __enter__(self) -> ClockWatch:
        self._rows: list[list[float]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        query = ["nvidia-smi", f"--query-gpu={SAMPLED}", "--format=csv,noheader,nounits"]
        while not self._is_over.wait(SAMPLE_S):
            line = _output([*query, "--id=0"])
            if line is None:
                return
            with suppress(ValueError):  # [N/A]
                self._rows.append([float(value) for value in line.split(",")])

    def summary(self) -> Json | None:
        """Median and lowest or highest of what was sampled while the GPU was busy."""
        busy = [row for row in self._rows if row[4] > 0]
        if not busy:
            return None
        sm, memory, watts, degrees, _, used = zip(*busy, strict=True)
        return {
            "sm_mhz": median(sm),
            "sm_mhz_lowest": min(sm),
            "memory_mhz": median(memory),
            "watts": median(watts),
            "degrees_highest": max(degrees),
            "memory_used_mib": max(used),
        }
