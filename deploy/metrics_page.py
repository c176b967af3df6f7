"""Write the tables of docs/metrics.md from the code: `python deploy/metrics_page.py`.

The text around the tables is written by hand; tests/service/test_metrics_page.py fails while page
and code disagree.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from service.metrics import SECTIONS, vocabulary

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
BEGIN, END = "<!-- vocabulary: written by deploy/metrics_page.py -->", "<!-- end of vocabulary -->"


def tables() -> str:
    """Every section of the vocabulary, in Markdown."""
    return "\n".join(_section(section) for section in SECTIONS)


def page(text: str) -> str:
    """The page with its tables as they should be. Raises `ValueError` for one without markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no {BEGIN} or no {END}")
    return f"{before}{begin}\n\n{tables()}\n{end}{after}"


def _section(section: type) -> str:
    lines = [
        f"### {section.__name__ if section.__name__ != 'Http' else 'HTTP'}",
        "",
        inspect.cleandoc(section.__doc__ or ""),
        "",
        "| metric | kind | labels | what |",
        "|---|---|---|---|",
    ]
    for one in vocabulary(section):
        labels = ", ".join(f"`{label}`" for label in one.labels)
        text = one.text
        if one.buckets:
            text += f" {len(one.buckets)} buckets, {one.buckets[0]:g} to {one.buckets[-1]:g}."
        lines.append(f"| `{one.full_name}` | {one.kind} | {labels} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
