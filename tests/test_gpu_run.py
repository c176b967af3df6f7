"""`python -m loadtests.gpu --dry-run`: what would run unattended on a GPU machine runs here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.gpu.__main__ import BUDGET_S, parts, run_part
from loadtests.gpu.cases import CASES, DETERMINISTIC
from loadtests.gpu.report import render

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "loadtests.gpu", "--dry-run")


@pytest.mark.slow
def test_a_dry_run_measures_and_reports(tmp_path: Path) -> None:
    """A case, and the comparison of greedy tokens."""
    for word in ("prefill", "greedy"):
        subprocess.run(
            [*COMMAND, "--only", word, "--out", str(tmp_path / word)],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
    (prefill,) = (tmp_path / "prefill").glob("*.json")
    found = json.loads(prefill.read_text())["parts"]["llama-3.1-8b prefill, prompts of 1,024"]
    assert found["tokens_per_s"] > 0
    assert "another model" in prefill.with_suffix(".md").read_text()
    (greedy,) = (tmp_path / "greedy").glob("*.json")
    assert json.loads(greedy.read_text())["parts"]["greedy tokens"]["equal"] is True


def test_a_part_that_fails_or_hangs_is_told_and_costs_only_itself() -> None:
    assert "boom" in run_part(["-c", "raise SystemExit('boom')"], 30)["error"]
    assert run_part(["-c", "import time; time.sleep(60)"], 5.5)["error"] == "not done after 6 s"
    assert run_part(["-c", ""], 30)["error"] == "", "wrote nothing"
    assert run_part(["-c", ""], 1) == {"error": "no time left"}


def test_the_report_shows_every_part_and_what_failed() -> None:
    report = {
        "gpu": "NVIDIA H200",
        "date": "2026-11-21",
        "versions": {"torch": "2.13.0"},
        "clocks_before": "1980 MHz",
        "clocks_after": None,
        "parts": {
            CASES[0].name: {"tokens_per_s": 142.5, "decode_step_ms": 7.0},
            CASES[1].name: {"error": "CUDA out of memory"},
            "idle share": {"idle_share": 0.02},
        },
    }
    table = render(report)
    assert "| 285 | 230 | 255 | 142 | 0.50 | 7.00 |" in table
    assert f"**{CASES[1].name} failed**: CUDA out of memory" in table
    assert "- idle share: {'idle_share': 0.02}" in table


def test_every_part_has_a_limit_within_the_budget() -> None:
    assert BUDGET_S < 540
    names = [name for name, _, _ in parts(is_dry=False)]
    assert len(names) == len(set(names))
    assert {case.name for case in CASES + DETERMINISTIC} <= set(names)
    assert all(limit_s <= 120 for _, _, limit_s in parts(is_dry=False))
