"""Test and measure the GPU path, unattended, in under nine minutes.

    python -m loadtests.gpu                    # on a machine with a GPU
    python -m loadtests.gpu --dry-run          # every part with tiny shapes on a CPU

First the tests that need a GPU, then every case of cases.py, the share of time in which the device
is idle, what deterministic mode costs, transformers on the same work, and the server at 256
streams. Each part runs in a process of its own under a time limit; what fails or finds no time left
is said in the report and costs nothing else. Writes JSON and a table to loadtests/results/<gpu>/.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtests.gpu.cases import CASES, DETERMINISTIC
from loadtests.gpu.report import DRY_RUN, render

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "loadtests" / "results"
BUDGET_S = 525.0
CLOCKS = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu,persistence_mode"
# The tests that a GPU runs natively; everywhere else they run in Triton's interpreter.
TESTS = ("tests/model/gpu", "tests/engine/test_mixing.py", "tests/engine/test_overlap.py")
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, help="folder; without it, loadtests/results/<gpu>")
    parser.add_argument("--only", help="parts whose name holds this word")
    given = parser.parse_args()
    gpu = DRY_RUN if given.dry_run else gpu_name()
    deadline = time.monotonic() + BUDGET_S
    report: Json = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": gpu,
        "versions": versions(),
        "clocks_before": clocks(),
        "parts": {},
    }
    for name, command, limit_s in parts(given.dry_run):
        if given.only is not None and given.only not in name:
            continue
        print(f"{name} ...", flush=True)
        report["parts"][name] = run_part(command, min(limit_s, deadline - time.monotonic()))
        print(f"  {json.dumps(report['parts'][name])[:200]}", flush=True)
    report["clocks_after"] = clocks()
    folder = given.out or RESULTS / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    (folder / f"gpu-{stamp}.json").write_text(json.dumps(report, indent=1) + "\n")
    table = render(report)
    (folder / f"gpu-{stamp}.md").write_text(table)
    print(table)


def parts(is_dry: bool) -> list[tuple[str, list[str], float]]:
    """(name, command that ends with the file it writes, limit in seconds), the most wanted
    first: what is late in the list may find no time left."""
    dry = ["--dry-run"] if is_dry else []

    def section(name: str, limit_s: float) -> tuple[str, list[str], float]:
        return name, ["-m", "loadtests.gpu.sections", name, *dry, "--out"], limit_s

    served = ["-m", "loadtests.gpu.served", *dry, "--out"]
    tests = ["-m", "loadtests.gpu.tests", *dry, *TESTS, "--out"]
    return [
        ("tests", tests, 110),
        section("greedy tokens", 40),
        *(section(case.name, case.limit_s) for case in CASES),
        section("idle share", 45),
        *(section(case.name, 45) for case in DETERMINISTIC),
        ("served", served, 75),
        section("transformers", 60),
        section("start", 90),
    ]


def run_part(command: list[str], limit_s: float) -> Json:
    """What the part wrote, and how long it took; or `error`."""
    if limit_s < 5:
        return {"error": "no time left"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        try:
            done = subprocess.run(
                [sys.executable, *command, str(out)],
                cwd=ROOT,
                timeout=limit_s,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {limit_s:.0f} s", "took_s": limit_s}
        took_s = round(time.monotonic() - began, 1)
        if done.returncode or not out.exists():
            return {"error": (done.stderr or done.stdout)[-1500:], "took_s": took_s}
        found: Json = json.loads(out.read_text())
        return found | {"took_s": took_s}


def gpu_name() -> str:
    """Raises `SystemExit` where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --dry-run runs every part on the CPU")
    return torch.cuda.get_device_name()


def clocks() -> str | None:
    """What nvidia-smi says of clocks, power and temperature at the moment."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "vitrine"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return found | {"commit": commit.stdout.strip()}


if __name__ == "__main__":
    main()
