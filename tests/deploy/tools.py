"""Prometheus' own tools, where they are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
RULES = (PROMETHEUS / "rules.yml", PROMETHEUS / "alerts.yml")


def need(tool: str) -> str:
    """Its path; skips the test, with the remedy, where it is not installed."""
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed: `make observability-tools` installs Debian's")
    return path


def promtool(*words: str | Path) -> str:
    """What it prints; fails the test when it finds something."""
    command = [need("promtool"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
