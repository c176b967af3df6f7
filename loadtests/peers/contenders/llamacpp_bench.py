"""llama.cpp's llama-batched-bench: prefill and decode of a batch, without sampling."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from loadtests.peers.folder import Folder
from loadtests.peers.work import Measurement, PeerError, Work, serve_work

PROGRAM = "llama-batched-bench"
ATTEMPTS = 3


def measure(work: Work) -> Iterator[Measurement]:
    """Every batch in one process; it warms up by itself.

    Its log thread prints the rows, and a process that ends early can lose the last one on a
    busy machine: what is missing is run again.
    """
    missing = set(work.batches)
    for _ in range(ATTEMPTS):
        for row in _rows(work, sorted(missing)):
            measurement = _measurement(work, row)
            missing.discard(measurement.batch)
            yield measurement
        if not missing:
            return
    raise PeerError(f"{PROGRAM} printed nothing about batches {sorted(missing)}")


def _rows(work: Work, batches: list[int]) -> Iterator[dict[str, float]]:
    folder = Folder(Path(work.folder))
    room = max(batches) * (work.prompt_tokens + work.output_tokens)
    command = {
        "-m": folder.gguf(work.shape, work.dtype),
        "-t": work.threads,
        "-c": room + 256,
        "-b": 4096,
        "-ub": 512,
        "-npp": work.prompt_tokens,
        "-ntg": work.output_tokens,
        "-npl": ",".join(map(str, batches)),
        "-fa": "on",
        "--output-format": "jsonl",
    }
    arguments = [str(word) for pair in command.items() for word in pair]
    process = subprocess.Popen(
        [folder.llamacpp_program(PROGRAM), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        for line in process.stdout or ():
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        raise PeerError(f"{PROGRAM} ended with status {process.returncode}")


def _measurement(work: Work, row: dict[str, float]) -> Measurement:
    batch = int(row["pl"])
    return Measurement(
        batch=batch,
        decode_tokens_per_s=row["speed_tg"],
        prefill_tokens_per_s=row["speed_pp"],
        end_to_end_tokens_per_s=batch * work.output_tokens / (row["t_pp"] + row["t_tg"]),
    )


if __name__ == "__main__":
    serve_work(measure)
