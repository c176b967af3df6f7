"""Which limits are the knee? `vitrine bench` under a closed loop of more users than seats, for each
value of one limit, the others at their defaults.

    python -m loadtests.limits --limit max-num-seqs --out runs/limits-stories.json
    python -m loadtests.limits --limit max-step-ratio --shape gpt2 --dtype bfloat16
    python -m loadtests.limits --limit max-batched-tokens --engine '--max-step-ratio 0'

Rounds go through all values in turn, because a machine's speed drifts; shown are medians of a
value's rounds, tokens/s also as the median of its ratios to the round's best, and how many cores
other work kept busy at most. --out is written after every measurement, and those that are in it
are not repeated. What the figures meant for the defaults stands in NOTES.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from loadtests.peers.machine import commit

VALUES = {
    "max-num-seqs": (8, 16, 32, 64, 128),
    "max-batched-tokens": (128, 256, 512, 1024, 2048),
    "max-step-ratio": (1.25, 1.5, 2.0, 3.0, 5.0, 0.0),
}
KEPT = ("output_tokens_per_s", "ttft_mean_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s")
Json = dict[str, object]
Measured = dict[str, float]


def main() -> int:
    given = _arguments()
    values = given.values or VALUES[given.limit]
    settings: Json = {
        name: getattr(given, name)
        for name in ("limit", "shape", "dtype", "users", "requests", "prompt_len", "output_len")
    } | {"engine": given.engine}
    found = _kept(given.out, settings)
    for number in range(given.rounds):
        for value in values:
            runs = found.setdefault(f"{value:g}", [])
            if len(runs) > number:
                continue
            runs.append(bench(given, value))
            print(f"round {number + 1}, {given.limit} {value:g}: {_words(runs[-1])}", flush=True)
            _write(given.out, settings, found)
    Console(width=100).print(table(given.limit, {f"{v:g}": found[f"{v:g}"] for v in values}))
    return 0


def bench(given: argparse.Namespace, value: float) -> Measured:
    """One run of `vitrine bench` with this value of the limit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "service", "bench", "--dtype", given.dtype]
        command += [] if given.shape is None else ["--shape", given.shape]
        command += ["--concurrency", str(given.users), "--num-requests", str(given.requests)]
        command += ["--prompt-len", str(given.prompt_len), "--output-len", str(given.output_len)]
        command += ["--think-s", "0.05", "--warmup", "0", "--repeat", "1", "--json", str(path)]
        command += [*given.engine.split(), f"--{given.limit}", f"{value:g}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        said = json.loads(path.read_text())
    (measured,) = said["measurements"]
    found: Measured = {name: measured["median"][name] for name in KEPT}
    # Other work on the machine: a value measured beside much of it says nothing.
    found["foreign_cores"] = measured["median"]["foreign_cores"] or 0.0
    return found | {"threads": said["model"]["threads"]}


def table(limit: str, found: dict[str, list[Measured]]) -> Table:
    """A row for each value."""
    rounds = min(len(runs) for runs in found.values())
    best = [max(runs[n]["output_tokens_per_s"] for runs in found.values()) for n in range(rounds)]
    made = Table(title=f"--{limit}; times in ms, medians of {rounds} rounds", title_justify="left")
    for name in (limit, "tokens/s", "of the best", "TTFT mean", "p99", "ITL p50", "p99", "others"):
        made.add_column(name, justify="right")
    for value, runs in found.items():
        medians = {name: median(run[name] for run in runs) for name in KEPT}
        share = median(runs[n]["output_tokens_per_s"] / best[n] for n in range(rounds))
        times = [f"{1e3 * medians[name]:,.1f}" for name in KEPT[1:]]
        others = max(run.get("foreign_cores", 0.0) for run in runs)
        speed = f"{medians['output_tokens_per_s']:,.0f}"
        made.add_row(value, speed, f"{share:.0%}", *times, f"{others:.2f}")
    return made


def _words(measured: Measured) -> str:
    times = ", ".join(f"{name[:-2]} {1e3 * measured[name]:.1f} ms" for name in KEPT[1:])
    others = f"{measured['foreign_cores']:.2f} cores kept busy by others"
    return f"{measured['output_tokens_per_s']:.0f} tokens/s, {times}, {others}"


def _kept(out: Path | None, settings: Json) -> dict[str, list[Measured]]:
    """What --out holds of the same settings."""
    if out is None or not out.exists():
        return {}
    held = json.loads(out.read_text())
    if held["settings"] != settings:
        raise SystemExit(f"{out} is of other settings: {held['settings']}")
    found: dict[str, list[Measured]] = held["values"]
    return found


def _write(out: Path | None, settings: Json, found: dict[str, list[Measured]]) -> None:
    if out is None:
        return
    date = datetime.now(UTC).isoformat(timespec="minutes")
    content = {"date": date, "commit": commit(), "settings": settings, "values": found}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.limits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--limit", choices=tuple(VALUES), required=True)
    parser.add_argument("--values", type=float, nargs="+", help="of the limit, else usual ones")
    parser.add_argument("--shape", help="random weights of a published model, else the bundled one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--users", type=int, default=96)
    parser.add_argument("--requests", type=int, default=384, help="of a measurement")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--engine", default="", help="more flags of `vitrine bench`, in one string")
    parser.add_argument("--out", type=Path, help="JSON; goes on with what is in it")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
