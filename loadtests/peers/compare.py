"""`run`: the contenders in turns, each in its own process, on a machine that is quiet."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from loadtests.peers.columns import Column
from loadtests.peers.folder import Folder
from loadtests.peers.machine import QUIET_CORES, busy_s, wait_until_quiet
from loadtests.peers.work import Measurement, Work

REPOSITORY = Path(__file__).parents[2]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds for one process, seconds to wait for a quiet machine before it (0: not at all),
    and how often it is run again when somebody disturbed it."""

    limit_s: float
    wait_s: float
    repeats: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one process of one contender brought."""

    column: str
    round: int
    measurements: tuple[Measurement, ...]
    error: str | None
    was_quiet: bool  # when it started
    others_cores: float | None  # used by everybody else while it ran

    @property
    def disturbed(self) -> bool:
        return (self.others_cores or 0.0) > QUIET_CORES


@dataclass(frozen=True, slots=True)
class Comparison:
    """A whole run. `missing` says per column why it, or a part of it, is not there."""

    work: Work
    outcomes: tuple[Outcome, ...]
    missing: dict[str, str]


def compare(
    columns: list[Column],
    work: Work,
    *,
    rounds: int,
    bounds: Bounds,
    say: Say,
) -> Comparison:
    """`rounds` rounds over the contenders; each round begins with another of them."""
    folder = Folder(Path(work.folder))
    missing = {c.name: r for c in columns if (r := c.missing(folder, work)) is not None}
    for name, reason in missing.items():
        say(f"no column {name}: {reason}")
    there = [column for column in columns if column.name not in missing]
    outcomes: list[Outcome] = []
    for number in range(rounds):
        for column in _turned(there, number):
            batches = tuple(b for b in work.batches if not _given_up(outcomes, column.name, b))
            if not batches:
                continue
            todo = replace(work, batches=batches, seed=work.seed + number)
            outcome = _measure_in_quiet(column, folder, todo, number, bounds, say)
            outcomes.append(outcome)
            for measurement in outcome.measurements:
                say(f"round {number + 1}, {column.name}: {_brief(measurement)}")
            if outcome.error:
                missing[column.name] = outcome.error
                say(f"round {number + 1}, {column.name}: {outcome.error}")
    return Comparison(work, tuple(outcomes), missing)


def _turned(columns: list[Column], number: int) -> list[Column]:
    """The same cycle, begun elsewhere in every round."""
    at = number % len(columns) if columns else 0
    return columns[at:] + columns[:at]


def _given_up(outcomes: list[Outcome], name: str, batch: int) -> bool:
    """A batch that brought an error or ran out of time is not tried again."""
    return any(
        outcome.column == name
        and outcome.error is not None
        and batch not in {m.batch for m in outcome.measurements}
        for outcome in outcomes
    )


def _measure_in_quiet(
    column: Column, folder: Folder, work: Work, number: int, bounds: Bounds, say: Say
) -> Outcome:
    """The first try that nobody disturbed, else the one that was disturbed least."""
    tries: list[Outcome] = []
    for _ in range(1 + bounds.repeats):
        quiet = wait_until_quiet(bounds.wait_s, say) if bounds.wait_s else False
        tries.append(_measure(column, folder, work, number, bounds.limit_s, quiet))
        if tries[-1].error or not tries[-1].disturbed:
            return tries[-1]
        say(f"{column.name} was disturbed: others used {tries[-1].others_cores} cores")
    return min(tries, key=lambda outcome: outcome.others_cores or 0.0)


def _measure(
    column: Column, folder: Folder, work: Work, number: int, limit_s: float, quiet: bool
) -> Outcome:
    before, began, own = busy_s(), time.perf_counter(), _own_cpu_s()
    measurements, error = _run(column, folder, work, limit_s)
    others = None
    if before is not None:
        used = (busy_s() or 0.0) - before - (_own_cpu_s() - own)
        others = round(max(0.0, used) / (time.perf_counter() - began), 2)
    return Outcome(column.name, number, measurements, error, quiet, others)


def _run(
    column: Column, folder: Folder, work: Work, limit_s: float
) -> tuple[tuple[Measurement, ...], str | None]:
    """All that a contender's process printed, and why it ended early, if it did."""
    environment = os.environ | column.environment
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if not column.environment:
        environment.pop("OMP_WAIT_POLICY", None)
    log = folder.logs / f"run-{column.module}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            column.command(folder, work),
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            cwd=REPOSITORY,
            start_new_session=True,  # so that its own children can be ended with it
        ) as process,
    ):
        error = None
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            error = f"not done after {limit_s:.0f} s"
    if process.returncode and error is None:
        lines = log.read_text(errors="replace").strip().splitlines()
        error = lines[-1] if lines else f"ended with status {process.returncode}"
    return tuple(_measurements(output.decode())), error


def _measurements(output: str) -> Iterator[Measurement]:
    for line in output.splitlines():
        if line.startswith("{") and line.endswith("}"):
            yield Measurement.from_json(line)


def _own_cpu_s() -> float:
    """CPU seconds of this process and of all children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _brief(measurement: Measurement) -> str:
    rates = {
        "decode": measurement.decode_tokens_per_s,
        "prefill": measurement.prefill_tokens_per_s,
        "end to end": measurement.end_to_end_tokens_per_s,
    }
    told = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items() if rate is not None)
    return f"batch {measurement.batch}: {told} tokens/s"
