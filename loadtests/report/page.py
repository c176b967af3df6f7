"""One HTML file with everything in it: figures as SVG, words, tables, prices to edit."""

from __future__ import annotations

import html
from datetime import UTC, datetime
from pathlib import Path

from loadtests.report import computed, style
from loadtests.report.drawing import Drawing, Material, name_of
from loadtests.report.figures_money import servings
from loadtests.report.lanes import has_gpu

HERE = Path(__file__).parent


def render(material: Material, drawings: list[Drawing]) -> str:
    """The page."""
    sections = "\n".join(_section(number + 1, one) for number, one in enumerate(drawings))
    parts = {
        "%STYLE%": (HERE / "page.css").read_text(),
        "%SCRIPT%": (HERE / "page.js").read_text(),
        "%ANSWER%": _answer(material),
        "%NOTICE%": _notice(material),
        "%CONTENTS%": "".join(
            f'<li><a href="#{one.key}">{html.escape(one.title)}</a></li>' for one in drawings
        ),
        "%FIGURES%": sections,
        "%PRICES%": _prices(material),
        "%COUNTED%": _counted(material),
        "%MACHINES%": _machines(material),
        "%DATE%": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    page = (HERE / "page.html").read_text()
    for mark, text in parts.items():
        page = page.replace(mark, text)
    return page


def _section(number: int, one: Drawing) -> str:
    words = "".join(f"<p>{html.escape(text)}</p>" for text in one.why)
    svg = style.to_svg(one.figure, one.key)
    return (
        f'<section id="{one.key}"><h2>{number}. {html.escape(one.title)}</h2>'
        f'<p class="claim">{html.escape(one.claim)}</p>'
        f'<figure role="img" aria-label="{html.escape(one.alt)}">{svg}</figure>{words}</section>'
    )


def _answer(material: Material) -> str:
    """The ratio of roofs, which no program changes much."""
    cpu, *others = material.lanes
    gpu = next((lane for lane in others if lane.runs or "H100" in lane.name), cpu)
    reading = gpu.roof.read_bytes_per_s / cpu.roof.read_bytes_per_s
    arithmetic = gpu.roof.flops_per_s / cpu.roof.flops_per_s
    kind = "measured" if gpu.is_measured else "by its data sheet"
    return (
        "<p><strong>Because decoding reads every weight for every step, and prefill multiplies "
        "with all of them.</strong> "
        f"{html.escape(gpu.name)} ({kind}) reads memory {reading:,.0f} times as fast as the CPU "
        f"measured here ({html.escape(cpu.name)}), and multiplies {arithmetic:,.0f} times as fast. "
        "One stream gets the first ratio; only many streams at the same time, or long prompts, "
        "get the second, and that is what a GPU has to be kept busy with to be worth its price. "
        "A small model, or little to do, is better off on a CPU.</p>"
    )


def _notice(material: Material) -> str:
    if has_gpu(material.lanes):
        return ""
    return (
        '<p class="notice"><strong>GPU measurements are missing:</strong> no GPU was on this '
        "machine and none is on record. What is shown of GPUs is computed from their data sheets: "
        "the roofline, which no program reaches. It is labelled as computed everywhere, and drawn "
        "dotted or hatched.</p>"
    )


def _prices(material: Material) -> str:
    """Inputs for every device, and a row for each way to serve."""
    model = material.served[-1] if material.served else "qwen3-8b"
    inputs = "".join(
        f"<tr><th>{html.escape(lane.label)}</th>"
        f'<td><input type="number" min="0" step="any" data-price="{place}" '
        f'aria-label="dollars an hour, {html.escape(lane.name)}" '
        f'value="{lane.running.dollars_per_hour:g}"></td>'
        f'<td><input type="number" min="0" step="any" data-watts="{place}" '
        f'aria-label="watts, {html.escape(lane.name)}" value="{lane.running.watts:g}"></td></tr>'
        for place, lane in enumerate(material.lanes)
    )
    rows = "".join(
        f'<tr data-lane="{material.lanes.index(one.lane)}" data-speed="{one.tokens_per_s:.6g}">'
        f"<th>{html.escape(one.label)}</th><td>{one.tokens_per_s:,.0f}</td>"
        f'<td class="dollars">{_dollars(one):.3g}</td>'
        f'<td class="energy">{_energy(one):.3g}</td></tr>'
        for one in servings(material, model)
    )
    return (
        "<table><thead><tr><th>device</th><th>dollars an hour</th><th>watts</th></tr></thead>"
        f"<tbody>{inputs}</tbody></table>"
        f"<table><thead><tr><th>{html.escape(name_of(model))}</th><th>tokens/s</th>"
        "<th>$ a million tokens</th><th>kWh a million tokens</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _dollars(one: object) -> float:
    lane, speed = one.lane, one.tokens_per_s  # type: ignore[attr-defined]
    return computed.cost_per_million(lane.running.dollars_per_hour, speed)


def _energy(one: object) -> float:
    lane, speed = one.lane, one.tokens_per_s  # type: ignore[attr-defined]
    return computed.energy_per_million_kwh(lane.running.watts, speed)


def _counted(material: Material) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name_of(run.model))}: {html.escape(one.what)}</th>"
        f"<td>{one.flops / 1e6:,.1f}</td><td>{one.counted_flops / 1e6:,.1f}</td>"
        f"<td>{one.counted_flops / one.flops - 1:+.2%}</td>"
        f"<td>{one.weight_bytes / 1e6:,.1f}</td><td>{one.counted_weight_bytes / 1e6:,.1f}</td></tr>"
        for run in material.runs
        for one in run.counted
    )
    return (
        "<table><thead><tr><th></th><th>MFLOP, from the architecture</th><th>as torch counted</th>"
        "<th>difference</th><th>MB of weights, from the architecture</th>"
        f"<th>as torch was given</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _machines(material: Material) -> str:
    rows = []
    for lane in material.lanes:
        first = next(iter(lane.runs.values()), None)
        if first is None:
            said = lane.source
        else:
            host = first.host
            busy = max(
                (one.foreign_cores or 0.0 for run in lane.runs.values() for one in run.offline),
                default=0.0,
            )
            said = (
                f"{host.processor}, {host.cores} cores, torch {host.torch}, commit {host.commit}, "
                f"{host.date}, mode {first.mode}; others kept up to {busy:.2f} cores busy meanwhile"
            )
        rows.append(
            f"<tr><th>{html.escape(lane.label)}</th>"
            f"<td>{lane.roof.read_bytes_per_s / 1e9:,.0f}</td>"
            f"<td>{lane.roof.flops_per_s / 1e12:,.2f}</td>"
            f'<td class="words">{html.escape(said)}</td></tr>'
        )
    models = ", ".join(sorted({f"{name_of(run.model)} in {run.dtype}" for run in material.runs}))
    return (
        "<table><thead><tr><th>device</th><th>GB/s</th><th>TFLOP/s</th>"
        f"<th class='words'>from</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f"<p>Models: {html.escape(models)}.</p>"
    )
