"""`vitrine bench`: how fast the engine is on this machine, and how far from its limits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode, SettingsConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from model.threads import set_wait_policy
from service.bench.workload import Workload
from service.commands import CommandError
from service.settings import ModelSettings, SettingsError, engine_config, read_settings

if TYPE_CHECKING:
    from service.bench.results import Measurement
    from service.engine.core import EngineCore
    from service.engine.messages import ModelInfo
    from service.engine.roofline import Roofline
    from service.engine.traffic import Traffic


WIDTH = 120
ROUNDS = 8  # of a closed loop: requests of each user
FEWEST_ROUNDS = 4  # a steady state has a beginning and an end that are not it


def _split(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


Batches = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    NoDecode,
    BeforeValidator(_split),
    Field(min_length=1),
]


class BenchSettings(ModelSettings):
    """Measure the engine alone, without HTTP: random prompts, a fixed number of tokens each,
    a table on standard output. Ctrl-C ends it with what was measured so far."""

    model_config = SettingsConfigDict(
        cli_prog_name="vitrine bench", cli_shortcuts={"json-file": "json"}
    )

    shape: str | None = Field(
        None, description="random weights of a published model, such as gpt2, instead of --model"
    )
    batch: Batches = Field(
        (1, 8, 32), description="requests in flight at most, e.g. 1,8,32: one measurement each"
    )
    concurrency: Batches | None = Field(
        None,
        description="instead of --batch, a closed loop: so many users, e.g. 1,8,32, each of whom "
        "asks, waits for the end, and asks again; times and tokens/s are of the steady state",
    )
    think_s: float = Field(
        0.0,
        ge=0,
        description="with --concurrency: pause of a user between two requests, on average; random",
    )
    prompt_len: int = Field(128, ge=1, description="tokens of each prompt")
    output_len: int = Field(128, ge=1, description="tokens generated for each request")
    num_requests: int | None = Field(
        None,
        ge=1,
        description="requests of a measurement; without it, as many as the batch, or "
        f"{ROUNDS} for each user",
    )
    rate: float | None = Field(
        None, gt=0, description="requests/s, Poisson arrivals; without it, all come at once"
    )
    shared_prefix: float = Field(
        0.0, ge=0, le=1, description="share of each prompt that all have in common, in the cache"
    )
    temperature: float = Field(0.0, ge=0, le=2, description="0 always takes the likeliest token")
    repeat: int = Field(3, ge=1, description="runs of each measurement; medians are shown")
    warmup: int = Field(1, ge=0, description="runs before that, not counted")
    seed: int = Field(0, ge=0, lt=2**63, description="of prompts, arrivals and random weights")
    json_file: Path | None = Field(None, description="write every number to this file")

    def workload(self, batch: int) -> Workload:
        """The measurement with `batch` requests in flight, or users."""
        is_closed = self.concurrency is not None
        return Workload(
            batch=batch,
            num_requests=self.num_requests or batch * (ROUNDS if is_closed else 1),
            prompt_len=self.prompt_len,
            output_len=self.output_len,
            rate=self.rate,
            shared_prefix_len=round(self.shared_prefix * self.prompt_len),
            temperature=self.temperature,
            seed=self.seed,
            is_closed=is_closed,
            think_s=self.think_s,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the measurements: batches or users."""
        return self.concurrency or self.batch


def run(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON."""
    settings = read_settings(BenchSettings, arguments)
    _check(settings)
    set_wait_policy(os.environ)  # before torch is imported

    from model.checkpoint import CheckpointError
    from model.config import ConfigError
    from model.hub import HubError
    from service.bench.measure import WorkloadError
    from service.engine.start import StartError

    try:
        return _bench(settings)
    except (HubError, CheckpointError, ConfigError, StartError, WorkloadError) as error:
        raise CommandError(str(error)) from None


def _check(settings: BenchSettings) -> None:
    """What two settings say against each other."""
    if settings.shape is not None and settings.model is not None:
        raise SettingsError("--shape has random weights and --model a checkpoint's: give one")
    if settings.shape is not None and settings.revision is not None:
        raise SettingsError("--revision is of a hub id; --shape has none")
    if settings.concurrency is None:
        if settings.think_s:
            raise SettingsError("--think-s is of users: give --concurrency too")
    elif "batch" in settings.model_fields_set or settings.rate is not None:
        raise SettingsError("--concurrency says when requests come: no --batch and no --rate")
    else:
        _check_users(settings.concurrency, settings.num_requests)
    # More users than that wait for their turn, as at a server.
    if settings.concurrency is None and max(settings.batch) > settings.max_num_seqs:
        raise SettingsError(
            f"--batch {max(settings.batch)} is above --max-num-seqs {settings.max_num_seqs}"
        )
    if settings.json_file is not None and not settings.json_file.absolute().parent.is_dir():
        raise SettingsError(f"--json {settings.json_file}: there is no such directory")


def _check_users(concurrency: tuple[int, ...], num_requests: int | None) -> None:
    """Enough requests for a steady state."""
    fewest = FEWEST_ROUNDS * max(concurrency)
    if num_requests is not None and num_requests < fewest:
        raise SettingsError(
            f"--num-requests {num_requests}: {max(concurrency)} users need at least {fewest}, "
            f"{FEWEST_ROUNDS} each, to come to a steady state"
        )


def _bench(settings: BenchSettings) -> int:
    import torch

    from service.bench.machine import describe_machine, peak_memory_bytes, reset_peak_memory
    from service.bench.report import Report, render
    from service.engine.roofline import measure_roofline
    from service.engine.start import WEIGHTS
    from service.engine.traffic import traffic_of

    core, info = _start(settings)
    needed = settings.prompt_len + settings.output_len
    if needed > info.context_length:
        raise CommandError(
            f"--prompt-len {settings.prompt_len} and --output-len {settings.output_len} make "
            f"{needed} tokens; the context holds {info.context_length}"
        )
    device = torch.device(info.device)
    dtype = torch.bfloat16 if info.dtype in WEIGHTS else getattr(torch, info.dtype)
    machine = describe_machine(device)
    roofline = measure_roofline(device, dtype)
    traffic = traffic_of(core.runner.config, dtype, int8=info.dtype in WEIGHTS)
    reset_peak_memory()
    measurements: list[Measurement] = []
    status = 0
    try:
        _measure(settings, core, traffic, roofline, measurements)
    except KeyboardInterrupt:
        status = 130
    if not measurements:
        return status
    report = Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version("vitrine"),
        settings=settings.model_dump(mode="json"),
        machine=machine,
        model=info,
        roofline=roofline,
        measurements=tuple(measurements),
        peak_memory_bytes=peak_memory_bytes(),
    )
    # A file or a pipe has no width; many batches need one.
    Console(width=None if sys.stdout.isatty() else WIDTH).print(render(report))
    if settings.json_file is not None:
        try:
            settings.json_file.write_text(report.to_json())
        except OSError as error:
            raise CommandError(f"--json {settings.json_file}: {error.strerror}") from None
    return status


def _start(settings: BenchSettings) -> tuple[EngineCore, ModelInfo]:
    """The engine, on a checkpoint or on random weights."""
    from model.families import read_config
    from model.families.published import PUBLISHED
    from model.hub import resolve_model
    from service.bench.random_weights import start_random_engine
    from service.engine.start import start_engine

    if settings.shape is None:
        directory = resolve_model(settings.model, settings.revision)
        return start_engine(engine_config(settings, directory), progress=sys.stderr.isatty())
    name = settings.shape.lower()
    if name not in PUBLISHED:
        raise SettingsError(f"--shape {settings.shape!r} is none of {', '.join(PUBLISHED)}")
    return start_random_engine(
        read_config(PUBLISHED[name]),
        engine_config(settings, Path(name)),
        needed_len=max(settings.prompt_len + settings.output_len, settings.max_model_len or 0),
        seed=settings.seed,
    )


def _measure(
    settings: BenchSettings,
    core: EngineCore,
    traffic: Traffic,
    roofline: Roofline,
    measurements: list[Measurement],
) -> None:
    """Every batch, one after the other, into `measurements`; an interrupted one with the
    repeats that were finished."""
    from service.bench.measure import run_workload
    from service.bench.results import Measurement, Result, summarize

    with _bar(len(settings.sizes) * (settings.warmup + settings.repeat)) as advance:
        numbers = count()
        for batch in settings.sizes:
            workload = settings.workload(batch)
            results: list[Result] = []
            try:
                for repeat in range(-settings.warmup, settings.repeat):
                    what = "batch" if settings.concurrency is None else "users"
                    advance(f"{what} {batch}, {'warm-up' if repeat < 0 else f'run {repeat + 1}'}")
                    done = run_workload(core, workload, next(numbers))
                    if repeat >= 0:
                        results.append(summarize(done, workload, traffic, roofline))
            finally:
                if results:
                    measurements.append(Measurement.of(workload, results))


@contextmanager
def _bar(num_runs: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; yields what says that the next run begins. It is drawn between runs
    only: drawing would cost what is measured."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns,
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=num_runs, completed=-1)

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=what, refresh=True)

        yield advance
