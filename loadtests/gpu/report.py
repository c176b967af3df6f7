"""The run as a table in Markdown."""

from __future__ import annotations

from typing import Any

from loadtests.gpu.cases import CASES, DETERMINISTIC, Case

Json = dict[str, Any]
DRY_RUN = "dry-run"  # instead of a GPU's name: tiny models on a CPU


def render(report: Json) -> str:
    """Every part has a line, those that failed too."""
    parts: dict[str, Json] = report["parts"]
    is_dry = report["gpu"] == DRY_RUN
    lines = [
        f"# {report['gpu']}, {report['date']}",
        "",
        *(f"- {name}: {version}" for name, version in report["versions"].items()),
        f"- clocks before: {report['clocks_before']}",
        f"- clocks after: {report['clocks_after']}",
        "",
        "| case (bf16) | roof of an H200 | goal | stretch | tokens/s | of the roof | step, ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            _case(case, parts[case.name], is_dry)
            for case in CASES + DETERMINISTIC
            if case.name in parts
        ),
        "",
    ]
    names = {case.name for case in CASES + DETERMINISTIC}
    for name, found in parts.items():
        if name not in names:
            lines.append(f"- {name}: {found}")
    errors = {name: found["error"] for name, found in parts.items() if "error" in found}
    lines += ["", *(f"**{name} failed**: {error}" for name, error in errors.items())]
    return "\n".join(lines).rstrip() + "\n"


def _case(case: Case, found: Json, is_dry: bool) -> str:
    head = f"| {case.name} | {case.roof:,.0f} | {case.goal:,.0f} | {case.stretch:,.0f} "
    if "error" in found:
        return f"{head}| failed | | |"
    rate, step = found["tokens_per_s"], found["decode_step_ms"]
    shown = "" if step is None else f"{step:.2f}"
    share = "another model" if is_dry else f"{rate / case.roof:.2f}"
    return f"{head}| {rate:,.0f} | {share} | {shown} |"
