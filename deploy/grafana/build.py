"""Write the dashboards: `python -m deploy.grafana.build`.

JSON for Grafana is made from this, never by hand; tests/deploy/test_grafana.py fails while the two
disagree, and `python -m loadtests.dashboards` runs every query against a server under load.
"""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.gpu import gpu
from deploy.grafana.overview import overview
from deploy.grafana.steps import engine
from deploy.grafana.where import where

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = (overview, engine, where, gpu)


def written(dashboard: Dashboard) -> str:
    """A dashboard as its file has it."""
    return JSONEncoder(sort_keys=True, indent=2).encode(dashboard.build()) + "\n"


def files() -> dict[str, str]:
    """Every dashboard's text, by its file's name."""
    made = [make() for make in DASHBOARDS]
    return {f"{dashboard.build().uid}.json": written(dashboard) for dashboard in made}


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text)
