"""Metrics that are kept elsewhere and read at every scrape: the engine's, the machine's, the
build's. What they are called and say is in `service/metrics.py`."""

from __future__ import annotations

import asyncio
import logging
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from service.client import Engine
from service.devices import DeviceSample, DeviceWatch
from service.engine_record import EngineRecord
from service.health import CAUSES, STATES
from service.metrics import Build, Cache, Devices, Latency, Requests, Steps
from service.metrics import Engine as Names

log = logging.getLogger("vitrine")

UP_STATES = ("idle", "busy", "draining")
# A scrape waits no longer for a driver; it gets what was seen before.
LONGEST_LOOK_S = 1.0


class EngineCollector(Collector):
    """The engine's state, its queue, its cache and its steps. All of a scrape is read at one
    moment: nothing else runs on the event loop meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        yield from self._health()
        yield from self._stats()
        yield from _steps(self._engine.record)
        yield Latency.INTER_TOKEN.show_distributions([((), self._engine.record.inter_token_s)])

    def _health(self) -> Iterator[Metric]:
        health = self._engine.health
        yield Names.UP.show_value(float(health.state in UP_STATES))
        yield Names.STATE.show(*(((state,), float(state == health.state)) for state in STATES))
        yield Names.HEARTBEAT_AGE.show_value(health.heartbeat_age_s)
        yield Names.RESTARTS.show(
            *(((cause,), float(health.restarts.get(cause, 0))) for cause in CAUSES)
        )
        yield Requests.QUEUE_REQUESTS.show_value(health.queue_requests)
        yield Requests.QUEUE_TOKENS.show_value(health.queue_tokens)
        yield Requests.RESUMED.show_value(self._engine.record.num_resumed)

    def _stats(self) -> Iterator[Metric]:
        stats = self._engine.stats
        totals = self._engine.record.totals(stats)
        yield Names.RUNNING.show_value(stats.num_running)
        yield Names.WAITING.show_value(stats.num_waiting)
        yield Names.STEPS.show_value(totals["steps"])
        yield Names.PREEMPTIONS.show_value(totals["preemptions"])
        yield Names.MEMORY_SHORTAGES.show_value(totals["memory_shortages"])
        yield Names.PROMPT_TOKENS.show_value(totals["prompt_tokens"])
        yield Names.GENERATED_TOKENS.show_value(totals["generated_tokens"])
        yield Cache.BLOCKS.show(
            (("free",), stats.free_blocks),
            (("referenced",), stats.referenced_blocks),
            (("cached",), stats.cached_blocks),
        )
        yield Cache.CAPACITY.show_value(stats.total_blocks)
        yield Cache.QUERIED.show_value(totals["cache_queries"])
        yield Cache.HIT.show_value(totals["cache_hits"])


def _steps(record: EngineRecord) -> Iterator[Metric]:
    phases = [((name,), phase) for name, phase in record.phases.items()]
    yield Steps.SECONDS.show_distributions((name, phase.step_s) for name, phase in phases)
    yield Steps.SEQUENCES.show_distributions((name, phase.sequences) for name, phase in phases)
    yield Steps.TOKENS.show_distributions((name, phase.tokens) for name, phase in phases)
    yield Steps.PARTS.show(*(((part,), seconds) for part, seconds in record.parts_s.items()))
    yield Steps.READ_BYTES.show(*((name, phase.num_bytes) for name, phase in phases))
    yield Steps.FLOPS.show(*((name, phase.flops) for name, phase in phases))
    if record.roofline is not None:
        yield Steps.ROOFLINE_SECONDS.show(*((name, phase.least_s) for name, phase in phases))
        yield Steps.ROOF_BYTES.show_value(record.roofline.read_bytes_per_s)
        yield Steps.ROOF_FLOPS.show_value(record.roofline.flops_per_s)


class DeviceCollector(Collector):
    """The machine, as the latest sample has it. What could not be read is left out: a gauge of 0
    would say that there is none."""

    def __init__(self, engine: Engine) -> None:
        self.sample = DeviceSample()
        self._engine = engine
        self._watch = DeviceWatch()
        self._looking: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Look at the machine, off the event loop."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        await asyncio.wait([self._looking], timeout=LONGEST_LOOK_S)

    async def _look(self) -> None:
        info, pid = self._engine.info, self._engine.health.pid
        device, uuid = ("cpu", None) if info is None else (info.device, info.device_uuid)
        try:
            self.sample = await asyncio.to_thread(self._watch.look, pid, device, uuid)
        except Exception:
            log.exception("the machine could not be looked at")

    def collect(self) -> Iterator[Metric]:
        found = self.sample
        for described, values in (
            (Devices.MEMORY_USED, found.memory_used_bytes),
            (Devices.MEMORY, found.memory_bytes),
            (Devices.UTILIZATION, found.utilization_ratio),
            (Devices.POWER, found.power_watts),
            (Devices.ENERGY, found.energy_joules),
            (Devices.PROCESS_CPU, found.process_cpu_s),
            (Devices.PROCESS_MEMORY, found.process_memory_bytes),
        ):
            yield described.show(*(((name,), value) for name, value in values.items()))


class BuildCollector(Collector):
    """What runs."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name
        self._versions = (package_version("vitrine"), platform.python_version())

    def collect(self) -> Iterator[Metric]:
        yield Build.BUILD.show((self._versions, 1))
        info = self._engine.info
        if info is None:
            return
        labels = (self._model_name, info.family, info.dtype, info.device)
        yield Build.MODEL.show(((*labels, info.device_name, info.attention_backend), 1))
        yield Build.WEIGHT_BYTES.show_value(info.weight_bytes)
        yield Build.CACHE_BYTES.show_value(info.kv_cache_bytes)


def package_version(package: str) -> str:
    """As installed."""
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return "not installed"
