"""The tests of the GPU path as a part of the run: how many passed, and what failed.

On a GPU the kernels run natively; a dry run only collects them. When its time ends, pytest is
interrupted and still says what it had seen by then.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS_S = 8.0  # for pytest's last words


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu.tests", description=__doc__)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--limit-s", type=float, default=600.0)
    given = parser.parse_args()
    # The mixing tests on CPUs have been run elsewhere: here the GPU's alone.
    flags = ["-q", "--no-header", "-p", "no:cacheprovider", "-k", "gpu or overlap"]
    flags += ["--collect-only"] if given.dry_run else ["-m", "not slow"]
    is_cut_short = False
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *flags, *given.paths],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(max(1.0, given.limit_s - WORDS_S))
        except subprocess.TimeoutExpired:
            is_cut_short = True
            process.send_signal(signal.SIGINT)
            process.wait(WORDS_S)
        output.seek(0)
        lines = output.read().strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    found = {
        "passed": process.returncode == 0,
        "cut_short": is_cut_short,
        "summary": lines[-1:],
        "failed": failed[:20],
    }
    if failed:
        found["last_words"] = lines[-60:]
    given.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
