"""What HTTP with server-sent events leaves of the engine's speed, at 256 streams on a GPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from loadtests.gpu.checkpoint import write_random

SHAPE = "qwen3-0.6b"
STREAMS, PROMPT_LEN, OUTPUT_LEN = 256, 128, 256


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu.served", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"streams": STREAMS, "prompt-len": PROMPT_LEN, "output-len": OUTPUT_LEN}
        model: list[str] = []
        if given.dry_run:
            sizes = {"streams": 2, "prompt-len": 4, "output-len": 8}
        else:
            write_random(SHAPE, Path(folder), "cuda")
            model = ["--model", folder]
        flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        seats = [] if given.dry_run else ["--seats", str(STREAMS)]
        out = Path(folder) / "served.json"
        flags += [*model, *seats, "--rounds", "1", "--out", str(out)]
        done = subprocess.run(
            [sys.executable, "-m", "loadtests.served", *flags], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr[-1500:])
        found = json.loads(out.read_text())
    given.out.write_text(json.dumps(found | {"printed": done.stdout.splitlines()}))


if __name__ == "__main__":
    main()
