"""A benchmark as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from service.bench.machine import Machine
from service.bench.results import Measurement, Result
from service.engine.messages import ModelInfo
from service.engine.roofline import Roofline

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Report:
    """All that one invocation found out."""

    date: str  # ISO 8601, UTC
    version: str  # of vitrine
    settings: dict[str, Any]
    machine: Machine
    model: ModelInfo
    roofline: Roofline
    measurements: tuple[Measurement, ...]
    peak_memory_bytes: int  # of this process while it measured

    def to_json(self) -> str:
        """Units are in the names; every repeat is there beside the medians."""
        content = {
            "date": self.date,
            "version": self.version,
            "settings": self.settings,
            "machine": asdict(self.machine),
            "model": msgspec.to_builtins(self.model),
            "roofline": asdict(self.roofline),
            "measurements": [asdict(measurement) for measurement in self.measurements],
            "peak_memory_bytes": self.peak_memory_bytes,
        }
        return json.dumps(content, indent=2) + "\n"


def render(report: Report) -> Group:
    """The medians: a column for each batch, a row for each number."""
    return Group(
        Text("\n".join(_headlines(report))), _table(report), Text("\n".join(_notes(report)))
    )


def _headlines(report: Report) -> list[str]:
    model, machine, roofline = report.model, report.machine, report.roofline
    device = "" if machine.device == "cpu" else f"{machine.device}, "
    return [
        f"{report.settings['shape'] or report.settings['model'] or 'the bundled model'}: "
        f"{model.family}, {model.num_parameters / 1e6:.1f} M parameters, {model.dtype}, "
        f"{model.weight_bytes / 1e6:.0f} MB; attention {model.attention_backend}, "
        f"{'deterministic' if model.deterministic else 'not deterministic'}",
        f"{device}{machine.cpu}, {machine.cores} cores, {model.threads} threads, "
        f"torch {machine.torch}",
        f"this machine reads {roofline.read_bytes_per_s / 1e9:.1f} GB/s and does "
        f"{roofline.flops_per_s / 1e9:,.0f} GFLOP/s in {model.dtype}",
    ]


Cell = Callable[[Result], str]


def _number(name: str, scale: float = 1.0, digits: int = 0) -> Cell:
    return lambda result: _format(getattr(result, name), scale, digits)


def _format(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


# (what, how to show it); None draws a line.
ROWS: tuple[tuple[str, Cell] | None, ...] = (
    ("decode, tokens/s", _number("decode_tokens_per_s")),
    ("end to end, tokens/s", _number("output_tokens_per_s")),
    ("prefill, tokens/s", _number("prefill_tokens_per_s")),
    None,
    ("TTFT p50, ms", _number("ttft_p50_s", 1e3, 1)),
    ("     p90", _number("ttft_p90_s", 1e3, 1)),
    ("     p99", _number("ttft_p99_s", 1e3, 1)),
    ("ITL  p50, ms", _number("itl_p50_s", 1e3, 2)),
    ("     p90", _number("itl_p90_s", 1e3, 2)),
    ("     p99", _number("itl_p99_s", 1e3, 2)),
    None,
    ("a decode step, ms", _number("step_s", 1e3, 3)),
    ("  forward", _number("forward_s", 1e3, 3)),
    ("  sample", _number("sample_s", 1e3, 3)),
    ("  host", _number("host_s", 1e3, 3)),
    ("    schedule", _number("schedule_s", 1e3, 3)),
    ("    build batch", _number("build_s", 1e3, 3)),
    ("    book", _number("book_s", 1e3, 3)),
    None,
    ("decode, GB/s", _number("decode_bytes_per_s", 1e-9, 1)),
    ("decode, GFLOP/s", _number("decode_flops_per_s", 1e-9, 1)),
    ("decode, % of the roof", _number("decode_roof_share", 100, 0)),
    ("prefill, GFLOP/s", _number("prefill_flops_per_s", 1e-9, 1)),
    ("prefill, % of the roof", _number("prefill_roof_share", 100, 0)),
    None,
    ("KV blocks at the peak", _number("peak_blocks")),
    ("preemptions", _number("preemptions")),
    ("prompt tokens from the cache", _number("cached_prompt_tokens")),
    ("cores kept busy by others", _number("foreign_cores", 1, 2)),
)


def _table(report: Report) -> Table:
    first = report.measurements[0].workload
    arrivals = "all at once" if first.rate is None else f"{first.rate:g} requests/s"
    if first.is_closed:
        arrivals = f"one after the other, {1e3 * first.think_s:g} ms apart"
    table = Table(
        title=f"prompts of {first.prompt_len}, outputs of {first.output_len} tokens, {arrivals}; "
        f"medians of {len(report.measurements[0].repeats)}",
        title_justify="left",
    )
    table.add_column("users" if first.is_closed else "batch", no_wrap=True)
    for measurement in report.measurements:
        table.add_column(str(measurement.workload.batch), justify="right", overflow="fold")
    for row in ROWS:
        if row is None:
            table.add_section()
        else:
            what, cell = row
            table.add_row(what, *(cell(measurement.median) for measurement in report.measurements))
    return table


def _notes(report: Report) -> list[str]:
    model = report.model
    notes = [
        f"KV cache: {model.num_blocks} blocks of {model.block_size} tokens, "
        f"{model.kv_cache_bytes / GIB:.2f} GiB; resident at the peak: "
        f"{report.peak_memory_bytes / GIB:.2f} GiB"
    ]
    shares = [measurement.median.decode_roof_share or 0.0 for measurement in report.measurements]
    if max(shares) > 1:
        notes.append("over 100 % of the roof: weights or keys are read from the cache, not memory")
    foreign = [measurement.median.foreign_cores or 0.0 for measurement in report.measurements]
    if max(foreign) > 0.1:
        notes.append("the machine was not idle: other work slowed this down")
    return notes
