"""Every query that people and alerts rely on, from the files that Grafana and Prometheus read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"
# Ours, and what the rules make of them.
_METRIC = re.compile(r"\bvitrine[_:][a-zA-Z0-9_:]+")


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel; `expr` still has Grafana's variables."""

    dashboard: str
    panel: str
    legend: str
    expr: str


def read_queries(folder: Path = FOLDER) -> list[Query]:
    """Of all dashboards, in order."""
    queries: list[Query] = []
    for path in sorted(folder.glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            queries += [
                Query(dashboard["uid"], panel["title"], one.get("legendFormat", ""), one["expr"])
                for one in panel.get("targets", [])
            ]
    return queries


def read_variables(folder: Path = FOLDER) -> set[tuple[str, str]]:
    """(label, selector) of every variable that a dashboard fills from Prometheus."""
    found = set()
    for path in sorted(folder.glob("*.json")):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                found.add(_label_values(variable))
    return found


def _label_values(variable: dict[str, Any]) -> tuple[str, str]:
    match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
    if match is None:
        raise ValueError(f"{variable['name']}: {variable['query']!r} is no label_values(...)")
    return match[2], match[1]


def interpolated(expr: str, scrape_interval_s: float) -> str:
    """With Grafana's variables as it fills them in: all servers, and a rate interval of four
    scrapes, which is what it takes for steps as short as a scrape."""
    values = {
        "$__rate_interval": f"{4 * scrape_interval_s:g}s",
        "$job": ".*",
        "$instance": ".*",
    }
    for name, value in values.items():
        expr = expr.replace(name, value)
    if "$" in expr:
        raise ValueError(f"a variable that is not known: {expr}")
    return expr


def metrics_in(expr: str) -> set[str]:
    """The names of ours that a query uses."""
    return set(_METRIC.findall(expr))
