"""What a report is drawn from: one `Run` for each model on each device, as a JSON file.

Recorded runs lie in loadtests/results/ and are read with the same schema; a file that breaks it is
refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from loadtests.load.statistics import Point

SCHEMA = 1
RESULTS = Path(__file__).parents[1] / "results"
PATTERN = "report-*.json"


class RecordError(Exception):
    """A recorded run cannot be read; the message names the file and the field."""


class Host(msgspec.Struct, frozen=True):
    """Where and when it was measured."""

    name: str  # as figures call it
    processor: str
    cores: int
    accelerator: str | None  # name of the GPU
    torch: str
    commit: str
    date: str  # ISO 8601, UTC


class Roof(msgspec.Struct, frozen=True):
    """What a device can do at most in one dtype."""

    read_bytes_per_s: float
    flops_per_s: float

    def least_s(self, num_bytes: float, flops: float) -> float:
        """The shortest time for so much (Williams et al. 2009, doi:10.1145/1498765.1498785)."""
        return max(num_bytes / self.read_bytes_per_s, flops / self.flops_per_s)


class Offline(msgspec.Struct, frozen=True):
    """The engine alone: medians of `vitrine bench` at one batch size."""

    batch: int
    prompt_len: int
    output_len: int
    decode_tokens_per_s: float
    output_tokens_per_s: float
    prefill_tokens_per_s: float
    step_s: float
    forward_s: float
    sample_s: float
    host_s: float
    foreign_cores: float | None  # kept busy by others meanwhile


class Closed(msgspec.Struct, frozen=True):
    """So many users, each with one request after the other."""

    users: int
    point: Point


class Open(msgspec.Struct, frozen=True):
    """Requests at random moments, so many a second."""

    rate: float
    point: Point


class Served(msgspec.Struct, frozen=True):
    """Over HTTP, by Locust. `goodput` is the highest rate tried at which 99 percent met the SLO,
    `broke_at` the lowest at which they did not."""

    prompt_len: int
    output_len: int
    ttft_slo_s: float
    tpot_slo_s: float
    closed: list[Closed]
    open: list[Open]
    goodput: float | None
    broke_at: float | None
    client_cores: float  # the client took at most


class Where(msgspec.Struct, frozen=True):
    """Seconds of one decode step, by what they were spent on."""

    batch: int
    context: int
    method: str
    seconds: dict[str, float]


class Counted(msgspec.Struct, frozen=True):
    """One step's needs from the architecture, and as torch counted them while it ran."""

    what: str
    flops: float
    counted_flops: float
    weight_bytes: float
    counted_weight_bytes: float


class Limits(msgspec.Struct, frozen=True):
    """A server with other limits than the defaults, under the same load."""

    max_num_seqs: int
    max_batched_tokens: int
    users: int
    point: Point


class Run(msgspec.Struct, frozen=True):
    """All that was measured of one model on one device."""

    schema: int
    host: Host
    device: Literal["cpu", "cuda"]
    model: str
    config: dict[str, object]  # config.json of its architecture
    dtype: str
    mode: str  # quick or full
    roof: Roof
    offline: list[Offline]
    served: Served | None
    where: list[Where]
    counted: list[Counted]
    limits: list[Limits]
    is_recorded: bool = False


def read_run(path: Path) -> Run:
    """A recorded run. Raises `RecordError`."""
    try:
        run = msgspec.json.decode(path.read_bytes(), type=Run)
    except (OSError, msgspec.DecodeError) as error:
        raise RecordError(f"{path}: {error}") from None
    if run.schema != SCHEMA:
        raise RecordError(f"{path}: schema {run.schema}, this report reads {SCHEMA}")
    return msgspec.structs.replace(run, is_recorded=True)


def write_run(run: Run, path: Path) -> None:
    """As JSON, readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")


def recorded_runs(measured: list[Run], folder: Path = RESULTS) -> list[Run]:
    """The runs in `folder` of hosts' devices that were not measured now. Raises `RecordError`."""
    here = {(run.host.name, run.device) for run in measured}
    found = [read_run(path) for path in sorted(folder.glob(f"*/{PATTERN}"))]
    return [run for run in found if (run.host.name, run.device) not in here]
