"""Test and measure the GPU path, unattended, in under nine minutes.

    python -m loadtests.gpu                       # on a machine with a GPU
    python -m loadtests.gpu --only decode         # parts whose name holds a word
    python -m loadtests.gpu --dry-run             # every part with tiny shapes on a CPU

The kernels against their twins, greedy tokens against the CPU's, every case of cases.py, the share
of time in which the device is idle, the server at 256 streams, transformers on the same work, what
deterministic mode costs, a start, and the tests that need a GPU. Each part is a process of its own
with a time limit; the report is written again after each. What fails, hangs, is not installed or
finds no time left is said in the report and costs nothing else.

It needs torch, triton, numpy, safetensors, tokenizers, rich, jaxtyping and msgspec; parts that need
more, or what is not there, are skipped and say what is missing. To a machine without a network,
bring them along:

    python -m loadtests.gpu.packages --python 3.12     # fills .gpu-packages/, to be taken along
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtests.gpu.cases import CASES, COMPARED, DETERMINISTIC
from loadtests.gpu.machine import ClockWatch, clocks, probe, versions
from loadtests.gpu.packages import ENGINE, SERVER, TESTS, TRANSFORMERS, folder_of, missing
from loadtests.gpu.report import DRY_RUN, render

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "loadtests" / "results"
BUDGET_S = 525.0
LEAST_S = 5.0  # a part that gets less is not begun
WORDS_KEPT = 2000  # of what a part that failed printed last
# The tests that a GPU runs natively; everywhere else they run in Triton's interpreter.
TEST_PATHS = ("tests/model/gpu", "tests/engine/test_mixing.py", "tests/engine/test_overlap.py")
Json = dict[str, Any]
Part = tuple[str, list[str], float, tuple[str, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, help="folder; without it, loadtests/results/<gpu>")
    parser.add_argument("--only", help="parts whose name holds this word")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    given = parser.parse_args()
    began = time.monotonic()
    machine = {"gpu": DRY_RUN} if given.dry_run else probe()
    folder = given.out or RESULTS / re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"gpu-{datetime.now(UTC).strftime('%Y%m%dT%H%M%S')}.json"
    report: Json = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": machine["gpu"],
        "machine": machine,
        "versions": versions(ROOT),
        "clocks_before": clocks(),
        "clocks_after": None,
        "parts": {},
    }
    for name, command, limit_s, needs in parts(given.dry_run):
        if given.only is not None and given.only not in name:
            continue
        print(f"{time.monotonic() - began:4.0f} s  {name} ...", flush=True)
        left_s = given.budget_s - (time.monotonic() - began)
        if lacking := missing(needs):
            found: Json = {"skipped": f"not installed: {', '.join(lacking)}"}
        else:
            found = run_part(command, min(limit_s, left_s))
        report["parts"][name] = found
        report["clocks_after"], report["took_s"] = clocks(), round(time.monotonic() - began, 1)
        write(report, target)
        print(f"        {json.dumps(found)[:200]}", flush=True)
    write(report, target)
    print(render(report))


def write(report: Json, target: Path) -> None:
    """JSON and the table, whole or not at all: the process may be ended at any time."""
    for path, text in (
        (target, json.dumps(report, indent=1) + "\n"),
        (target.with_suffix(".md"), render(report)),
    ):
        draft = path.with_suffix(path.suffix + ".part")
        draft.write_text(text)
        draft.replace(path)


def parts(is_dry: bool) -> list[Part]:
    """(name, command that ends with the file it writes, limit in seconds, modules it needs), the
    most wanted first: what is late in the list may find no time left."""
    dry = ["--dry-run"] if is_dry else []

    def section(name: str, limit_s: float, needs: tuple[str, ...] = ENGINE) -> Part:
        return name, ["-m", "loadtests.gpu.sections", name, *dry, "--out"], limit_s, needs

    served = ["-m", "loadtests.gpu.served", *dry, "--out"]
    tests = ["-m", "loadtests.gpu.tests", *dry, *TEST_PATHS, "--out"]
    return [
        section("kernels", 60),
        section("greedy tokens", 60),
        *(section(case.name, case.limit_s) for case in CASES),
        section("idle share", 45),
        ("served", served, 110, SERVER),
        section("transformers", 60, TRANSFORMERS),
        *(section(case.name, case.limit_s) for case in (*COMPARED, *DETERMINISTIC)),
        section("start", 90),
        ("tests", tests, 120, TESTS),
    ]


def run_part(command: list[str], limit_s: float) -> Json:
    """What the part wrote, how long it took, and what the clocks did; `error` beside it when it
    failed or was ended, with what it had written by then."""
    if limit_s < LEAST_S:
        return {"error": "no time left"}
    began = time.monotonic()
    environment = dict(os.environ)
    if (brought := folder_of()) is not None:
        path = [str(brought), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    with tempfile.TemporaryDirectory() as folder, ClockWatch() as watch:
        out, log = Path(folder) / "part.json", Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command, str(out), "--limit-s", f"{limit_s - LEAST_S:.0f}"],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # so that nothing of it outlives its limit
            )
        error = None
        try:
            if process.wait(limit_s):
                error = log.read_text(errors="replace")[-WORDS_KEPT:] or "failed, without a word"
        except subprocess.TimeoutExpired:
            error = f"not done after {limit_s:.0f} s"
        finally:
            _end(process)
        found: Json = json.loads(out.read_text()) if out.exists() else {}
        if not found and error is None:
            error = "wrote nothing"
        found["took_s"] = round(time.monotonic() - began, 1)
        if error is not None:
            found["error"] = error
        if (seen := watch.summary()) is not None:
            found["clocks"] = seen
        return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and what it started, which would keep the GPU's memory from the next part. An engine's
    process has a session of its own, and ends with the server's."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
