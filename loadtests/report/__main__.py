"""Measure, and make the page.

    python -m loadtests.report --quick
    python -m loadtests.report --out runs/report --full
    python -m loadtests.report --draw-only

An interrupted report goes on where it was: every step's result is kept in OUT/steps until the
settings or the commit change. With --record NAME the runs are written to loadtests/results/NAME/,
from where reports on other machines take them.
"""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtests.load.run import LoadError
from loadtests.load.statistics import Slo
from loadtests.report.drawing import Drawing, Material
from loadtests.report.hardware import Running
from loadtests.report.lanes import lanes_of
from loadtests.report.measuring import (
    MeasureError,
    Subject,
    missing_memory,
    run_of,
    steps_of,
    weights_gb,
)
from loadtests.report.plan import BUNDLED, MODES, Mode, with_limits
from loadtests.report.records import (
    RESULTS,
    RecordError,
    Run,
    read_run,
    recorded_runs,
    write_run,
)
from loadtests.report.steps import Step
from model.families.published import PUBLISHED


def main() -> int:
    """Status 0 when the page is there."""
    given = _arguments()
    console = Console(stderr=True)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server ends too
    try:
        measured = _kept(given.out) if given.draw_only else _measured(given, console)
        runs = [*measured, *recorded_runs(measured)]
    except (MeasureError, LoadError, RecordError) as error:
        console.print(f"report: {error}", style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on with what is in {given.out}/steps")
        return 130
    if not runs:
        console.print(f"report: nothing is measured yet in {given.out}, nor recorded")
        return 1
    page = draw(runs, dict(given.price), given.out)
    console.print(f"{page} in {time.monotonic() - began:.0f} s")
    return 0


def draw(runs: list[Run], prices: dict[str, Running], out: Path) -> Path:
    """report.html and a PNG for each figure."""
    # Late: drawing needs matplotlib, measuring does not wait for it.
    from loadtests.report import page, style
    from loadtests.report.figures_load import latency, throughput
    from loadtests.report.figures_money import cost, demand, size
    from loadtests.report.figures_parts import limits, where
    from loadtests.report.figures_roof import bytes_per_token, roofline

    material = Material(tuple(runs), tuple(lanes_of(runs, prices)))
    makers = (throughput, latency, roofline, bytes_per_token, where, size, cost, demand, limits)
    drawn: list[Drawing | None] = [make(material) for make in makers]
    drawings = [one for one in drawn if one is not None]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(page.render(material, drawings))
    for one in drawings:
        style.to_png(one.figure, out / f"{one.key}.png")
        style.close(one.figure)
    return path


def _measured(given: argparse.Namespace, console: Console) -> list[Run]:
    """Every model on every device that is here, step by step."""
    mode: Mode = MODES[given.mode](Slo(given.ttft_ms / 1e3, given.tpot_ms / 1e3))
    mode = with_limits(mode) if given.limits else mode
    devices = given.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    names = given.model or [*mode.models, *mode.offline_only]
    plans: list[tuple[Subject, dict[str, Step[Any]]]] = []
    for device in devices:
        for model in names:
            threads = given.threads if device == "cpu" else None
            subject = Subject(model, device, "bfloat16", threads, given.out / "checkpoints")
            lacking = missing_memory(subject)
            if lacking is not None:
                console.print(
                    f"{subject.name}: not measured, {weights_gb(subject):.1f} GB of weights and "
                    f"{lacking / 1e9:.1f} GB of memory too little; its roof is computed"
                )
                continue
            plans.append((subject, steps_of(subject, mode)))
    every = [step for _, steps in plans for step in steps.values()]
    total = sum(step.weight_s for step in every)
    left = [left_s for step in every if (left_s := step.left_s(given.out / "steps"))]
    console.print(
        f"{mode.name}: {', '.join(subject.name for subject, _ in plans)}; {len(left)} of "
        f"{len(every)} steps to do, about {max(1, round(sum(left) / 60))} min",
        markup=False,
        highlight=False,
    )
    measured = []
    with _progress(console) as progress:
        bar = progress.add_task("", total=total)

        def say(what: str) -> None:
            progress.update(bar, description=what)
            if not console.is_terminal:
                console.print(what, markup=False, highlight=False)

        for subject, steps in plans:
            results: dict[str, Any] = {}
            for place, step in steps.items():
                results[place] = step.result(given.out / "steps", say, results)
                progress.advance(bar, step.weight_s)
            run = run_of(subject, mode, results)
            write_run(run, given.out / f"report-{subject.name}.json")
            if given.record:
                write_run(run, RESULTS / given.record / f"report-{subject.name}.json")
            measured.append(run)
    return measured


def _kept(out: Path) -> list[Run]:
    """What was measured before."""
    from msgspec.structs import replace

    return [
        replace(read_run(path), is_recorded=False) for path in sorted(out.glob("report-*.json"))
    ]


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # Drawn twice a second: what is measured shares the cores with the bar.
    return Progress(
        *columns, console=console, refresh_per_second=2, disable=not console.is_terminal
    )


def _price(text: str) -> tuple[str, Running]:
    """NAME=DOLLARS:WATTS."""
    name, _, numbers = text.rpartition("=")
    try:
        dollars, watts = (float(word) for word in numbers.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DOLLARS_AN_HOUR:WATTS") from None
    if not name or dollars <= 0 or watts <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a device's name, and two numbers above 0")
    return name, Running(dollars, watts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vitrine report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = parser.add_mutually_exclusive_group()
    for name, words in (
        ("quick", "under five minutes on two cores (default)"),
        ("full", "an hour on two cores"),
    ):
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=words)
    parser.set_defaults(mode="quick")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder of the page")
    parser.add_argument("--device", action="append", choices=("cpu", "cuda"), help="else all here")
    parser.add_argument(
        "--model", action="append", choices=(BUNDLED, *PUBLISHED), help="else the mode's own"
    )
    parser.add_argument("--threads", type=int, help="of the engine on a CPU")
    parser.add_argument("--ttft-ms", type=float, default=500.0, help="SLO: to the first token")
    parser.add_argument("--tpot-ms", type=float, default=50.0, help="SLO: mean of each further one")
    parser.add_argument(
        "--price",
        type=_price,
        action="append",
        default=[],
        metavar="NAME=$/h:W",
        help="of a device as the page calls it; e.g. 'H100 SXM=2.5:700'",
    )
    parser.add_argument(
        "--limits", action="store_true", help="also --max-num-seqs and --max-batched-tokens, varied"
    )
    parser.add_argument("--draw-only", action="store_true", help="the page again, nothing measured")
    parser.add_argument("--record", metavar="NAME", help="keep the runs in loadtests/results/NAME")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
