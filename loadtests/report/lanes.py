"""The devices of a figure, each with a colour and a word on where its numbers come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.report.hardware import DATA_SHEETS, Running, running_costs
from loadtests.report.records import Roof, Run
from loadtests.report.style import COMPUTED_COLOURS, MEASURED_COLOURS

GPU_DTYPE = "bfloat16"  # what data sheets' figures are of


@dataclass(frozen=True, slots=True)
class Lane:
    """One device. `runs` by model; none for a device that is only known from its data sheet."""

    name: str
    label: str  # with where its numbers come from
    colour: str
    roof: Roof
    running: Running
    runs: dict[str, Run]
    memory_bytes: float | None = None
    source: str = ""

    @property
    def is_measured(self) -> bool:
        """Something ran on it."""
        return bool(self.runs)


def lanes_of(runs: Sequence[Run], prices: dict[str, Running]) -> list[Lane]:
    """Measured devices, recorded ones, then data sheets of those that nothing was measured on."""
    by_device: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_device.setdefault((run.host.name, run.device), []).append(run)
    lanes = []
    for number, ((name, _), own) in enumerate(by_device.items()):
        first = own[0]
        said = f"recorded {first.host.date[:10]}" if first.is_recorded else "measured"
        lanes.append(
            Lane(
                name,
                f"{name} ({said})",
                MEASURED_COLOURS[number % len(MEASURED_COLOURS)],
                _best_roof(own),
                running_costs(name, first.host, prices),
                {run.model: run for run in own},
            )
        )
    measured_names = " ".join(lane.name for lane in lanes)
    for sheet, colour in zip(DATA_SHEETS, COMPUTED_COLOURS, strict=False):
        if sheet.name.split()[0] in measured_names:
            continue
        lanes.append(
            Lane(
                sheet.name,
                f"{sheet.name} (computed)",
                colour,
                sheet.roof,
                running_costs(sheet.name, None, prices),
                {},
                sheet.memory_bytes,
                sheet.source,
            )
        )
    return lanes


def _best_roof(runs: Sequence[Run]) -> Roof:
    """Each run measures it; the machine can do the best of them."""
    return Roof(
        max(run.roof.read_bytes_per_s for run in runs), max(run.roof.flops_per_s for run in runs)
    )


def has_gpu(lanes: Sequence[Lane]) -> bool:
    """A GPU was measured, now or on record."""
    return any(run.device == "cuda" for lane in lanes for run in lane.runs.values())
