"""The tests of the GPU path as a part of the run: how many passed, and what failed.

On a GPU the kernels run natively; a dry run only collects them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu.tests", description=__doc__)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    # The mixing tests on CPUs have been run elsewhere: here the GPU's alone.
    flags = ["-q", "--no-header", "-p", "no:cacheprovider", "-k", "gpu or overlap"]
    flags += ["--collect-only"] if given.dry_run else ["-m", "not slow"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *given.paths], capture_output=True, text=True
    )
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    given.out.write_text(
        json.dumps({"passed": done.returncode == 0, "summary": lines[-1:], "failed": failed[:20]})
    )


if __name__ == "__main__":
    main()
