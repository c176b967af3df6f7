"""What /proc and NVML say, and what is left out where one of them says nothing."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from service.devices import DeviceWatch


class NVMLError(Exception):
    pass


def played_nvml(asked: list[str], **readings: Any) -> SimpleNamespace:
    """The module pynvml of a machine with one GPU."""

    def by_uuid(uuid: str) -> str:
        asked.append(uuid)
        return "handle"

    def read(name: str) -> Any:
        def reading(handle: str) -> Any:
            assert handle == "handle"
            if name not in readings:
                raise NVMLError("Not Supported")
            return readings[name]

        return reading

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetMemoryInfo=read("memory"),
        nvmlDeviceGetUtilizationRates=read("utilization"),
        nvmlDeviceGetPowerUsage=read("power"),
        nvmlDeviceGetTotalEnergyConsumption=read("energy"),
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_this_machine_and_this_process() -> None:
    watch = DeviceWatch()
    began = time.process_time()
    while time.process_time() - began < 0.05:
        pass
    sample = watch.look(os.getpid(), "cpu", None)
    this = psutil.Process()
    assert sample.process_cpu_s["api"] == pytest.approx(sum(this.cpu_times()[:2]), abs=0.1)
    assert sample.process_memory_bytes["engine"] == pytest.approx(this.memory_info().rss, rel=0.1)
    assert sample.memory_bytes["cpu"] == psutil.virtual_memory().total
    assert 0 < sample.memory_used_bytes["cpu"] < sample.memory_bytes["cpu"]
    assert 0 < sample.utilization_ratio["cpu"] <= 1
    assert sample.power_watts == {}


def test_utilization_is_over_a_while(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 25 kB\n")
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 700 100 0 0 0 0 0\n")
    watch = DeviceWatch(tmp_path)
    stat.write_text("cpu  130 0 100 760 110 0 0 0 0 0\n")
    sample = watch.look(None, "cpu", None)
    assert sample.utilization_ratio == {"cpu": pytest.approx(0.3)}
    assert sample.memory_used_bytes == {"cpu": 75 * 1024}
    stat.write_text("cpu  131 0 100 760 110 0 0 0 0 0\n")  # too soon to say
    assert watch.look(None, "cpu", None).utilization_ratio == {"cpu": pytest.approx(0.3)}


def test_a_machine_without_proc_tells_nothing(tmp_path: Path) -> None:
    sample = DeviceWatch(tmp_path / "none").look(1, "cpu", None)
    assert (sample.memory_bytes, sample.utilization_ratio, sample.process_cpu_s) == ({}, {}, {})


def test_a_gpu_in_base_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    nvml = played_nvml(
        asked,
        memory=SimpleNamespace(used=10, total=80),
        utilization=SimpleNamespace(gpu=75, memory=10),
        power=350_500,
        energy=2_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    watch = DeviceWatch(tmp_path)
    sample = watch.look(None, "cuda:0", "1234")
    assert (sample.memory_used_bytes, sample.memory_bytes) == ({"cuda:0": 10}, {"cuda:0": 80})
    assert sample.utilization_ratio == {"cuda:0": 0.75}
    assert (sample.power_watts, sample.energy_joules) == ({"cuda:0": 350.5}, {"cuda:0": 2.0})
    watch.look(None, "cuda:0", "1234")
    assert asked == ["GPU-1234"], "looked for once"


def test_what_a_gpu_does_not_tell_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = played_nvml([], memory=SimpleNamespace(used=10, total=80))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    sample = DeviceWatch(tmp_path).look(None, "cuda:0", "1234")
    assert sample.memory_bytes == {"cuda:0": 80}
    assert (sample.power_watts, sample.energy_joules) == ({}, {})


def test_no_nvml_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    watch = DeviceWatch(tmp_path)
    for _ in range(2):
        assert watch.look(None, "cuda:0", "1234").memory_bytes == {}
    assert [record.message for record in caplog.records] == [
        "no metrics of the GPU: they need pip install 'vitrine[gpu]'"
    ]
