"""What HTTP with server-sent events leaves of the engine's speed, at 256 streams on a GPU.

One after the other, since each takes the whole GPU: the engine alone, in the process of
`vitrine bench`, and then a server with the same flags.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from loadtests.faults.common import target
from loadtests.gpu.checkpoint import roomy_folder, write_random
from loadtests.served import served

SHAPE = "qwen3-0.6b"
STREAMS, PROMPT_LEN, OUTPUT_LEN = 256, 128, 256
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu.served", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--limit-s", type=float, default=600.0)
    given = parser.parse_args()
    sizes = (2, 4, 8) if given.dry_run else (STREAMS, PROMPT_LEN, OUTPUT_LEN)
    work = argparse.Namespace(
        streams=sizes[0], prompt_len=sizes[1], output_len=sizes[2],
        url=None, engine_pid=None, log=None, serve="",
    )  # fmt: skip
    found: Json = {"streams": sizes[0], "prompt_len": sizes[1], "output_len": sizes[2]}
    with roomy_folder(2**20 if given.dry_run else 4 * 2**30) as folder:
        write_random("stories15m" if given.dry_run else SHAPE, folder, _device(given.dry_run))
        flags = ["--model", str(folder), "--max-num-seqs", str(sizes[0]), "--no-deterministic"]
        flags += ["--dtype", "bfloat16", "--max-model-len", str(2 * (sizes[1] + sizes[2]))]
        flags += ["--max-batched-tokens", "64" if given.dry_run else "8192"]
        found["offline_tokens_per_s"] = offline(sizes, flags, folder)
        given.out.write_text(json.dumps(found))
        with target(work, *flags, "--roofline", "off", "--no-standby") as server:
            served(server.url, work)  # warm
            rates = [served(server.url, work) for _ in range(2)]
        found["served_tokens_per_s"] = max(rates)
        found["rates"] = rates
        found["ratio"] = max(rates) / found["offline_tokens_per_s"]
    given.out.write_text(json.dumps(found))


def _device(is_dry: bool) -> str:
    return "cpu" if is_dry else "cuda"


def offline(sizes: tuple[int, int, int], flags: list[str], folder: Path) -> float:
    """Tokens a second of the engine alone, from the first prompt to the last token."""
    out = folder / "bench.json"
    names = ("batch", "prompt-len", "output-len")
    work = [
        word for name, size in zip(names, sizes, strict=True) for word in (f"--{name}", str(size))
    ]
    done = subprocess.run(
        [sys.executable, "-m", "service", "bench", *work, *flags, "--repeat", "2", "--json", out],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("VITRINE_")},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-1500:])
    found = json.loads(out.read_text())["measurements"][0]["median"]
    return float(found["output_tokens_per_s"])


if __name__ == "__main__":
    main()
