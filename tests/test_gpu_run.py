"""`python -m loadtests.gpu --dry-run`: what would run unattended on a GPU machine runs here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from loadtests.gpu.__main__ import BUDGET_S, parts, run_part
from loadtests.gpu.cases import CASES, COMPARED, DETERMINISTIC
from loadtests.gpu.idle import idle_of
from loadtests.gpu.packages import ENGINE, SERVER, TESTS, missing
from loadtests.gpu.report import render

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "loadtests.gpu", "--dry-run")


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_a_dry_run_measures_every_part_and_reports(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--out", str(tmp_path)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    (target,) = tmp_path.glob("*.json")
    report = json.loads(target.read_text())
    found = report["parts"]
    assert list(found) == [name for name, *_ in parts(is_dry=True)]
    assert {name: part["error"] for name, part in found.items() if "error" in part} == {}
    assert all(found[case.name]["tokens_per_s"] > 0 for case in CASES + COMPARED + DETERMINISTIC)
    assert found["greedy tokens"]["equal"] is True
    assert found["kernels"]["within"] is True
    assert found["served"]["ratio"] > 0
    assert found["transformers"]["tokens"] == 3 * 6
    assert found["start"]["first_token_s"] > found["start"]["import_s"] > 0
    assert found["tests"]["passed"] is True
    assert report["versions"]["torch"] != "not installed"
    assert "another model" in target.with_suffix(".md").read_text()


def test_a_part_that_fails_or_hangs_is_told_and_costs_only_itself() -> None:
    assert "boom" in run_part(["-c", "raise SystemExit('boom')"], 30)["error"]
    assert run_part(["-c", "import time; time.sleep(60)"], 5.5)["error"] == "not done after 6 s"
    assert run_part(["-c", ""], 30)["error"] == "wrote nothing"
    assert run_part(["-c", ""], 1) == {"error": "no time left"}


HANGS = """
import json, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
Path(sys.argv[1]).write_text(json.dumps({"tokens_per_s": 5.0, "child": child.pid}))
time.sleep(300)
"""


def test_what_a_part_had_measured_is_kept_and_what_it_started_is_ended() -> None:
    """A server that outlived its part would keep the GPU's memory from all that follow."""
    found = run_part(["-c", HANGS], 6)
    assert found["tokens_per_s"] == 5.0
    assert found["error"] == "not done after 6 s"
    deadline = time.monotonic() + 10
    while psutil.pid_exists(found["child"]) and time.monotonic() < deadline:
        if psutil.Process(found["child"]).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        assert not psutil.pid_exists(found["child"])


def test_the_report_is_written_after_each_part_and_whole(tmp_path: Path) -> None:
    """Killed in the middle, what was measured is there."""
    process = subprocess.Popen(
        [*COMMAND, "--only", "decode, batch 1", "--out", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(tmp_path.glob("*.json")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    (target,) = tmp_path.glob("*.json")
    (found,) = list(json.loads(target.read_text())["parts"].values())[:1]
    assert found["tokens_per_s"] > 0
    assert target.with_suffix(".md").exists()


def test_parts_that_lack_a_module_are_skipped_with_its_name(tmp_path: Path) -> None:
    """On a machine that has torch, triton and not much else. The modules are hidden from the
    process that looks."""
    hide = "import sys; sys.modules['fastapi'] = sys.modules['pytest'] = None;"
    words = ["--dry-run", "--only", "e", "--budget-s", "4", "--out", str(tmp_path)]
    run = "import runpy; runpy.run_module('loadtests.gpu', run_name='__main__')"
    code = f"{hide} sys.argv[1:] = {words!r}; {run}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (target,) = tmp_path.glob("*.json")
    found = json.loads(target.read_text())["parts"]
    assert found["served"] == {"skipped": "not installed: fastapi"}
    assert found["tests"] == {"skipped": "not installed: fastapi, pytest"}
    assert found["kernels"] == {"error": "no time left"}
    assert "**served skipped**: not installed: fastapi" in target.with_suffix(".md").read_text()


def test_what_is_needed_is_here() -> None:
    assert missing(SERVER) == missing(TESTS) == []
    assert missing((*ENGINE, "no_such_module")) == ["no_such_module"]


def test_sections_of_the_engine_need_no_more_than_they_say() -> None:
    """A bare machine: what is not in `ENGINE` cannot be imported."""
    hidden = sorted({"tokenizers", "huggingface_hub", "jinja2", *SERVER, *TESTS} - set(ENGINE))
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r}));"
        "sys.argv[1:] = ['gpt2 decode, batch 256, context 512', '--dry-run', '--out', sys.argv[1]];"
        "import runpy; runpy.run_module('loadtests.gpu.sections', run_name='__main__')"
    )
    found = run_part(["-c", code], 60)
    assert "error" not in found, found["error"]
    assert found["tokens_per_s"] > 0


def test_idle_time_is_what_no_kernel_covers() -> None:
    spans = [(0.0, 10.0), (5.0, 20.0), (21.0, 30.0), (50.0, 60.0)]
    assert idle_of(spans) == {"idle_share": 21 / 60, "waiting_share": 20 / 60, "kernels": 4}
    assert idle_of([])["idle_share"] is None


def test_the_report_shows_every_part_and_what_failed() -> None:
    report = {
        "gpu": "NVIDIA H200",
        "date": "2026-11-21",
        "versions": {"torch": "2.13.0"},
        "clocks_before": "1980 MHz",
        "clocks_after": None,
        "parts": {
            CASES[0].name: {"tokens_per_s": 142.5, "decode_step_ms": 7.0, "start_s": 21.0},
            CASES[1].name: {"error": "CUDA out of memory"},
            "idle share": {"idle_share": 0.02},
        },
    }
    table = render(report)
    assert "| 285 | 230 | 255 | 142 | 0.50 | 7.00 | 21.00 |" in table
    assert f"**{CASES[1].name} failed**: CUDA out of memory" in table
    assert "- idle share: {'idle_share': 0.02}" in table


def test_every_part_has_a_limit_within_the_budget() -> None:
    assert BUDGET_S < 540
    names = [name for name, *_ in parts(is_dry=False)]
    assert len(names) == len(set(names))
    assert {case.name for case in CASES + COMPARED + DETERMINISTIC} <= set(names)
    assert all(limit_s <= 120 for _, _, limit_s, _ in parts(is_dry=False))
