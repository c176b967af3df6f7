"""The run as a table in Markdown."""

from __future__ import annotations

from typing import Any

from loadtests.gpu.cases import CASES, COMPARED, DETERMINISTIC, Case

Json = dict[str, Any]
MEASURED = CASES + COMPARED + DETERMINISTIC
DRY_RUN = "dry-run"  # instead of a GPU's name: tiny models on a CPU


def render(report: Json) -> str:
    """Every part has a line, those that failed too."""
    parts: dict[str, Json] = report["parts"]
    is_dry = report["gpu"] == DRY_RUN
    took = f", {report['took_s']:.0f} s" if "took_s" in report else ""
    lines = [
        f"# {report['gpu']}, {report['date']}{took}",
        "",
        *(f"- {name}: {version}" for name, version in report["versions"].items()),
        *(f"- {name}: {value}" for name, value in report.get("machine", {}).items()),
        f"- clocks before: {report['clocks_before']}",
        f"- clocks after: {report['clocks_after']}",
        "",
        "| case (bf16) | roof of an H200 | goal | stretch | tokens/s | of the roof | step, ms |"
        " start, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_case(case, parts[case.name], is_dry) for case in MEASURED if case.name in parts),
        "",
        *_verdicts(parts),
    ]
    names = {case.name for case in MEASURED}
    for name, found in parts.items():
        if name not in names:
            shown = {k: v for k, v in found.items() if k not in ("error", "last_words")}
            lines.append(f"- {name}: {shown}")
    for name, found in parts.items():
        if "skipped" in found:
            lines.append(f"**{name} skipped**: {found['skipped']}")
        if "error" in found:
            lines.append(f"**{name} failed**: {found['error']}")
    return "\n".join(lines).rstrip() + "\n"


def _case(case: Case, found: Json, is_dry: bool) -> str:
    head = f"| {case.name} "
    for number in (case.roof, case.goal, case.stretch):
        head += f"| {number:,.0f} " if number else "| "
    if "tokens_per_s" not in found:
        return f"{head}| {'skipped' if 'skipped' in found else 'failed'} | | | |"
    rate, step, start = (found.get(k) for k in ("tokens_per_s", "decode_step_ms", "start_s"))
    share = "another model" if is_dry else f"{rate / case.roof:.2f}" if case.roof else ""
    step_ms, start_s = ("" if x is None else f"{x:.2f}" for x in (step, start))
    return f"{head}| {rate:,.0f} | {share} | {step_ms} | {start_s} |"


def _verdicts(parts: dict[str, Json]) -> list[str]:
    """Ratios of two parts."""
    lines = []

    def rate(name: str) -> float | None:
        return parts.get(name, {}).get("tokens_per_s")

    for case in DETERMINISTIC:
        plain = rate(case.name.removeprefix("deterministic: "))
        if plain and (ours := rate(case.name)):
            lines.append(f"- {case.name}: {ours / plain:.2f} of the fastest mode")
    if (theirs := rate("transformers")) and (ours := rate(COMPARED[0].name)):
        lines.append(f"- {COMPARED[0].name}: {ours / theirs:.2f} x transformers")
    return lines
