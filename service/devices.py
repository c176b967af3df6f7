"""How busy the machine is: /proc for the processors and the two processes, NVML for the GPU.

Read when somebody scrapes, in a thread: a driver may take its time. NVML is asked through
nvidia-ml-py, which loads the driver's library and nothing of torch's; without either there are
simply no numbers of a GPU.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger("vitrine")

PROC = Path("/proc")
# Utilization is told over at least so long: the kernel counts in hundredths of a second.
_SHORTEST_S = 1.0


@dataclass(slots=True)
class DeviceSample:
    """One look, by the name of a device (cpu, cuda:0) or of a process (api, engine)."""

    memory_used_bytes: dict[str, float] = field(default_factory=dict)
    memory_bytes: dict[str, float] = field(default_factory=dict)
    utilization_ratio: dict[str, float] = field(default_factory=dict)
    power_watts: dict[str, float] = field(default_factory=dict)
    energy_joules: dict[str, float] = field(default_factory=dict)
    process_cpu_s: dict[str, float] = field(default_factory=dict)
    process_memory_bytes: dict[str, float] = field(default_factory=dict)


class DeviceWatch:
    """Looks at the machine; not from two threads at a time."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._cpu = _cpu_times(proc)
        self._cpu_at_s = time.monotonic()
        self._utilization: float | None = None
        self._gpu: Gpu | None = None
        self._gpu_uuid: str | None = None

    def look(self, engine_pid: int | None, device: str, device_uuid: str | None) -> DeviceSample:
        """How it is now. `device` is the engine's, `device_uuid` its GPU's."""
        sample = DeviceSample()
        for name, pid in (("api", os.getpid()), ("engine", engine_pid)):
            if pid is not None:
                self._look_at_process(sample, name, pid)
        self._look_at_cpu(sample)
        if device_uuid != self._gpu_uuid:
            self._gpu_uuid = device_uuid
            self._gpu = None if device_uuid is None else Gpu.find(device_uuid)
        if self._gpu is not None:
            self._gpu.look(sample, device)
        return sample

    def _look_at_process(self, sample: DeviceSample, name: str, pid: int) -> None:
        try:
            text = (self._proc / str(pid) / "stat").read_text()
        except OSError:  # it has ended, or this is no Linux
            return
        # proc(5): the name in parentheses may hold anything; after it utime is the 12th field,
        # stime the 13th, rss in pages the 22nd.
        fields = text.rpartition(")")[2].split()
        sample.process_cpu_s[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        sample.process_memory_bytes[name] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")

    def _look_at_cpu(self, sample: DeviceSample) -> None:
        memory = _memory(self._proc)
        if memory is not None:
            sample.memory_bytes["cpu"], sample.memory_used_bytes["cpu"] = memory
        now_s, times = time.monotonic(), _cpu_times(self._proc)
        if times is None or self._cpu is None:
            return
        if now_s - self._cpu_at_s >= _SHORTEST_S or self._utilization is None:
            busy, total = times[0] - self._cpu[0], times[1] - self._cpu[1]
            if total > 0:
                self._utilization = min(1.0, max(0.0, busy / total))
                self._cpu, self._cpu_at_s = times, now_s
        if self._utilization is not None:
            sample.utilization_ratio["cpu"] = self._utilization


@dataclass(slots=True)
class Gpu:
    """One GPU, through NVML."""

    nvml: Any  # the module pynvml, which has no types
    handle: Any

    @classmethod
    def find(cls, uuid: str) -> Gpu | None:
        """The GPU that CUDA calls so; None, and a line in the log, where NVML cannot be had."""
        try:
            import pynvml
        except ImportError:
            log.warning("no metrics of the GPU: they need pip install 'vitrine[gpu]'")
            return None
        named = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        try:
            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(named))
        except pynvml.NVMLError as error:
            log.warning("no metrics of the GPU: %s", error)
            return None

    def look(self, sample: DeviceSample, device: str) -> None:
        """Add what this GPU tells; not every GPU tells everything."""
        nvml, handle = self.nvml, self.handle
        readings: tuple[tuple[dict[str, float], Any], ...] = (
            (sample.memory_used_bytes, lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
            (sample.memory_bytes, lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total),
            (
                sample.utilization_ratio,
                lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            ),
            (sample.power_watts, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            (sample.energy_joules, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000),
        )
        for values, read in readings:
            try:
                values[device] = float(read())
            except nvml.NVMLError:
                continue


def _cpu_times(proc: Path) -> tuple[int, int] | None:
    """(busy, all) ticks of all processors since boot (proc(5)); None where nobody tells. Idle is
    what is not used and what waits for a disk."""
    try:
        line = (proc / "stat").read_text().partition("\n")[0]
    except OSError:
        return None
    ticks = [int(word) for word in line.split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _memory(proc: Path) -> tuple[float, float] | None:
    """(all, used) bytes of the machine's memory; None where nobody tells."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    total = kib["MemTotal"] * 1024
    return float(total), float(total - kib["MemAvailable"] * 1024)
