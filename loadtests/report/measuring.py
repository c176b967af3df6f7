"""The steps that measure one model on one device, and the run they make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil

from loadtests.peers.machine import commit
from loadtests.report.computed import needs_of, parameters_of
from loadtests.report.plan import BUNDLED, Mode
from loadtests.report.records import (
    SCHEMA,
    Counted,
    Host,
    Limits,
    Offline,
    Roof,
    Run,
    Served,
    Where,
)
from loadtests.report.serving import limits_at, server, sweep
from loadtests.report.steps import Doing, Step
from model.checkpoint_files import bundled_checkpoint
from model.families.published import PUBLISHED

Device = Literal["cpu", "cuda"]
COUNTED_PARAMETERS = 1_000_000_000  # counting runs the model in float32
# The weights as drawn, and packed for the engine, for a moment both.
MEMORY_FACTOR = 2.3
GPU_WEIGHT = 0.3  # of the time that a step takes on a CPU


class MeasureError(Exception):
    """A step failed; the message says how."""


class Bench(msgspec.Struct, frozen=True):
    """What one `vitrine bench` said."""

    host: Host
    roof: Roof
    offline: list[Offline]


@dataclass(frozen=True, slots=True)
class Subject:
    """One model on one device. `threads` of the engine on a CPU; None: torch's choice."""

    model: str
    device: Device
    dtype: str
    threads: int | None
    checkpoints: Path

    @property
    def config_file(self) -> Path | None:
        """config.json of the bundled model; the others are published shapes."""
        return bundled_checkpoint() / "config.json" if self.model == BUNDLED else None

    @property
    def config(self) -> dict[str, object]:
        """config.json."""
        if self.config_file is None:
            return PUBLISHED[self.model]
        raw: dict[str, object] = json.loads(self.config_file.read_text())
        return raw

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.device}-{self.model}-{self.dtype}"

    def engine_flags(self) -> list[str]:
        """Device, type and threads."""
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        return ["--device", self.device, "--dtype", self.dtype, *threads]

    def serve_flags(self) -> list[str]:
        """With the model, whose checkpoint is made if it is not there."""
        if self.model == BUNDLED:
            return self.engine_flags()
        from loadtests.report.checkpoints import make_checkpoint

        return ["--model", str(make_checkpoint(self.model, self.checkpoints)), *self.engine_flags()]


def missing_memory(subject: Subject) -> float | None:
    """Bytes that are lacking to measure it; None: it fits. A GPU is asked by the engine itself."""
    if subject.device != "cpu":
        return None
    needed = MEMORY_FACTOR * parameters_of(subject.config) * 2
    lacking = needed - psutil.virtual_memory().available
    return lacking if lacking > 0 else None


def steps_of(subject: Subject, mode: Mode) -> dict[str, Step[Any]]:
    """By their place in the run."""
    is_served = subject.model not in mode.offline_only
    # What another commit measured is not kept; the mode's numbers tell it apart too.
    common = {
        "subject": asdict(subject) | {"checkpoints": ""},
        "mode": asdict(replace(mode, limits=(), limit_users=0)),
        "commit": commit(),
    }
    speed = 1.0 if subject.device == "cpu" else GPU_WEIGHT
    billions = parameters_of(subject.config) / 1e9

    def step(
        place: str,
        kind: Any,
        make: Callable[[Doing], Any],
        weight_s: float,
        num_parts: int = 0,
        **more: object,
    ) -> Step[Any]:
        return Step(f"{subject.name}-{place}", common | more, kind, make, weight_s, num_parts)

    steps: dict[str, Step[Any]] = {
        "bench": step("bench", Bench, lambda _: bench(subject, mode), speed * (12 + 80 * billions)),
        "where": step(
            "where", list[Where], lambda _: where(subject, mode), speed * (6 + 60 * billions)
        ),
    }
    if billions < COUNTED_PARAMETERS / 1e9:
        steps["counted"] = step(
            "counted", list[Counted], lambda _: counted(subject), 5 + 10 * billions
        )
    if is_served:
        traffic = mode.traffic
        open_points = len(traffic.rate_shares) + traffic.probes
        seconds = len(traffic.users) * (traffic.closed_s + 2) + open_points * (traffic.open_s + 3)
        steps["served"] = step(
            "served",
            Served,
            lambda doing: served(subject, mode, doing),
            seconds,
            num_parts=len(traffic.users) + open_points,
        )
    for seqs, tokens in mode.limits if is_served else ():
        steps[f"limits-{seqs}-{tokens}"] = step(
            f"limits-{seqs}-{tokens}",
            Limits,
            lambda _, seqs=seqs, tokens=tokens: limits_at(  # type: ignore[misc]
                subject.serve_flags(), seqs, tokens, mode.traffic, mode.limit_users
            ),
            mode.traffic.closed_s + 6,
            users=mode.limit_users,
        )
    return steps


def run_of(subject: Subject, mode: Mode, results: dict[str, Any]) -> Run:
    """The steps' results as one run."""
    measured: Bench = results["bench"]
    return Run(
        schema=SCHEMA,
        host=measured.host,
        device=subject.device,
        model=subject.model,
        config=subject.config,
        dtype=subject.dtype,
        mode=mode.name,
        roof=measured.roof,
        offline=measured.offline,
        served=results.get("served"),
        where=results["where"],
        counted=results.get("counted", []),
        limits=[result for place, result in results.items() if place.startswith("limits-")],
    )


def bench(subject: Subject, mode: Mode) -> Bench:
    """`vitrine bench` of the engine alone, and the roofline it measures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        batches = ",".join(map(str, mode.batches))
        lengths = [str(mode.traffic.prompt_len), str(mode.bench_output_len)]
        _python(
            *("-m", "service", "bench", *_model_flags(subject), *subject.engine_flags()),
            *("--batch", batches, "--prompt-len", lengths[0], "--output-len", lengths[1]),
            *("--repeat", str(mode.repeats), "--json", str(path)),
        )
        said = json.loads(path.read_text())
    machine = said["machine"]
    accelerator = None if machine["device"] == "cpu" else machine["device"]
    host = Host(
        name=accelerator or f"{machine['cpu']}, {machine['cores']} cores",
        processor=machine["cpu"],
        cores=machine["cores"],
        accelerator=accelerator,
        torch=machine["torch"],
        commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="minutes"),
    )
    roof = Roof(said["roofline"]["read_bytes_per_s"], said["roofline"]["flops_per_s"])
    names = [name for name in Offline.__struct_fields__ if name not in _OF_WORKLOAD]
    offline = [
        Offline(
            **{name: one["median"][name] for name in names},
            **{name: one["workload"][name] for name in _OF_WORKLOAD},
        )
        for one in said["measurements"]
    ]
    return Bench(host, roof, offline)


_OF_WORKLOAD = ("batch", "prompt_len", "output_len")


def where(subject: Subject, mode: Mode) -> list[Where]:
    """Where the time of a step goes."""
    batches = ",".join(map(str, mode.where_batches))
    flags = [*_config_flags(subject), *subject.engine_flags(), "--batch", batches]
    return msgspec.json.decode(
        _python("-m", "loadtests.report.where", "time", *flags), type=list[Where]
    )


def counted(subject: Subject) -> list[Counted]:
    """What torch counts."""
    flags = _config_flags(subject)
    return msgspec.json.decode(
        _python("-m", "loadtests.report.where", "count", *flags), type=list[Counted]
    )


def served(subject: Subject, mode: Mode, doing: Doing) -> Served:
    """The sweep over HTTP."""
    alone: Bench = doing.earlier["bench"]

    def round_s(users: int) -> float:
        """From the engine alone: prompts one after the other, then steps together."""
        nearest = min(alone.offline, key=lambda one: abs(one.batch - users))
        step_s = nearest.step_s * max(1.0, users / nearest.batch)
        prompts_s = users * mode.traffic.prompt_len / nearest.prefill_tokens_per_s
        return prompts_s + mode.traffic.output_len * step_s

    doing.say("starting a server")
    with server(subject.serve_flags()) as url:
        return sweep(url, mode.traffic, round_s, doing)


def weights_gb(subject: Subject) -> float:
    """For messages."""
    return needs_of(subject.config, subject.dtype).weight_bytes / 1e9


def _model_flags(subject: Subject) -> list[str]:
    return [] if subject.model == BUNDLED else ["--shape", subject.model]


def _config_flags(subject: Subject) -> list[str]:
    if subject.config_file is not None:
        return ["--config", str(subject.config_file)]
    return ["--shape", subject.model]


def _python(*arguments: str) -> bytes:
    """Standard output of a Python process. Raises `MeasureError` with its last words."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VITRINE_")}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, env=environment, check=False
    )
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise MeasureError(f"python {' '.join(arguments[:4])}: {' '.join(words)}")
    return done.stdout
