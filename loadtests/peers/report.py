"""Medians, ranges and ratios of a comparison: as a table, and as JSON with every raw value."""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtests.peers import machine
from loadtests.peers.columns import OURS
from loadtests.peers.compare import Comparison
from loadtests.peers.folder import Folder
from loadtests.peers.work import Measurement

Pick = Callable[[Measurement], float | None]

# What is shown for each kind of work; of all of these more is better.
RATES: dict[str, list[tuple[str, Pick]]] = {
    "decode": [
        ("decode tokens/s", lambda m: m.decode_tokens_per_s),
        ("end-to-end tokens/s", lambda m: m.end_to_end_tokens_per_s),
    ],
    "prefill": [("prefill tokens/s", lambda m: m.prefill_tokens_per_s)],
    "http": [("tokens/s end to end", lambda m: m.end_to_end_tokens_per_s)],
}
TIMES: dict[str, Pick] = {
    "TTFT p50 ms": lambda m: m.ttft_p50_ms,
    "ITL p50 ms": lambda m: m.itl_p50_ms,
    "ITL p99 ms": lambda m: m.itl_p99_ms,
}


def show(comparison: Comparison, console: Console) -> None:
    """Print a table per rate, what is missing, and what disturbed the run."""
    work = comparison.work
    for title, pick in RATES[work.what]:
        console.print(_table(comparison, title, pick))
    if same := _same_ids(comparison):
        console.print(same)
    for name, reason in comparison.missing.items():
        console.print(f"missing from {name}: {reason}", markup=False)
    for outcome in (o for o in comparison.outcomes if o.disturbed):
        console.print(
            f"disturbed: others used {outcome.others_cores} cores during "
            f"{outcome.column}, round {outcome.round + 1}"
        )


def save(comparison: Comparison, folder: Path) -> Path:
    """Write the comparison with the machine, the versions and every raw value."""
    work = comparison.work
    fields = asdict(comparison)
    for private in ("folder", "checkpoint"):
        del fields["work"][private]
    now = datetime.datetime.now(datetime.UTC)
    content = {
        "date": now.isoformat(timespec="seconds"),
        "machine": {"processor": machine.processor(), "cores": machine.num_cores()},
        "versions": versions(Folder(Path(work.folder))),
        **fields,
    }
    folder.mkdir(parents=True, exist_ok=True)
    name = f"peers-{work.what}-{work.shape}-{work.dtype}-{now:%Y%m%dT%H%M%S}.json"
    target = folder / name
    text = json.dumps(content, indent=1).replace(work.folder, "$PEERS_DIR")
    target.write_text(text + "\n")
    return target


def versions(folder: Folder) -> dict[str, str]:
    """Of Vitrine and of each peer that is there."""
    found = {"vitrine": machine.commit()}
    for package in ("torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    sources = folder.llamacpp_vendored.parent.parent.name
    if folder.llamacpp_sources.exists():
        found["llama.cpp"] = f"in {sources}"
    if folder.python.exists():
        code = "import importlib.metadata as m; print(m.version('openvino-genai'))"
        command = [folder.python, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found["openvino-genai"] = done.stdout.strip()
    return found


def _table(comparison: Comparison, title: str, pick: Pick) -> Table:
    work = comparison.work
    table = Table(
        title=f"{work.shape} {work.dtype}, {work.prompt_tokens} + {work.output_tokens} tokens: "
        f"{title}, median \\[min-max]",
    )
    table.add_column("batch", justify="right")
    table.add_column("contender")
    table.add_column(title, justify="right")
    table.add_column("Vitrine / it", justify="right")
    times = TIMES if work.what == "http" else {}
    for heading in times:
        table.add_column(heading, justify="right")
    for batch in work.batches:
        ours = _by_round(comparison, OURS, batch, pick)
        for name in dict.fromkeys(o.column for o in comparison.outcomes if o.measurements):
            theirs = _by_round(comparison, name, batch, pick)
            ratios = [ours[n] / theirs[n] for n in ours if n in theirs]
            cells = [str(batch), name, _spread([*theirs.values()], ".0f")]
            cells.append("" if name == OURS else _spread(ratios, ".2f"))
            for time_of in times.values():
                values = _by_round(comparison, name, batch, time_of).values()
                cells.append(f"{statistics.median(values):.1f}" if values else "-")
            table.add_row(*cells)
        table.add_section()
    return table


def _by_round(comparison: Comparison, name: str, batch: int, pick: Pick) -> dict[int, float]:
    return {
        outcome.round: value
        for outcome in comparison.outcomes
        if outcome.column == name
        for measurement in outcome.measurements
        if measurement.batch == batch and (value := pick(measurement)) is not None
    }


def _spread(values: list[float], form: str) -> str:
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} \\[{low:{form}}-{high:{form}}]"


def _same_ids(comparison: Comparison) -> str:
    """How far each contender's first sequence agrees with Vitrine's: is it the same work?"""
    ids: dict[str, tuple[int, ...]] = {}
    for outcome in comparison.outcomes:
        for measurement in outcome.measurements:
            ids.setdefault(outcome.column, measurement.first_ids)
    ours = ids.pop(OURS, ())
    told = []
    for name, theirs in ids.items():
        if theirs and ours:
            same = next(
                (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            told.append(f"{name} {same} of {len(ours)}")
    return f"first ids equal to Vitrine's: {', '.join(told)}" if told else ""
