"""Do three clocks tell the same time? Locust, the server's own histograms, and `vitrine bench`.

    python -m loadtests.load.agreement
    python -m loadtests.load.agreement --shape bundled --dtype float32 --think-s 0.5 \\
        --prompt-len 256 --output-len 128 --seconds 20 --rounds 5

All three see the same closed loop: so many users, each of whom thinks for a moment, asks, reads to
the end, and begins again, prompts of random ids, all of the same lengths. They think longer
than an answer takes: users who ask at once stay in step for minutes, and how many stand in line for
their prompts is then a matter of how the run began. In the bench each user thinks as long, pause
for pause, as its fellow in Locust did; every round has pauses of its own. The engine has as many
threads in the server as in the bench, on cores that nothing else runs on: --threads of them, one by
default, so that on two cores the API process and the client share the other one. Every token is an
event of its own here (--max-events-s), as the bench sees every token.

By default the model has gpt2's shape and random weights. With the bundled one a step takes 0.55 to
0.7 ms on one thread, and telling of it, which a bench does not, 0.05 to 0.07: that is about the
bound by itself (loadtests/NOTES.md).

- Server: means of its histograms over the run (sum and count are exact, buckets are not) beside
  those of Locust's raw samples, within --within, 5 percent.
- Bench: tokens/s, time to first token and percentiles of the time between tokens, in the steady
  state of both, within --bench-within, 10 percent.

Locust and bench run in turns; a difference is the median of the rounds' own, because a machine's
speed changes more from one minute to the next than between the two. With --url there is no bench,
which needs the machine for itself. Status 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtests.faults.common import Target, add_server_arguments, target
from loadtests.load.run import Plan, Ran, run
from loadtests.load.samples import Sample
from loadtests.load.statistics import percentile

SAMPLE = re.compile(r"^(\w+?)_(sum|count)(?:\{(.*)\})? (\S+)$")
BUNDLED = "bundled"
WARM_S = 3
DRAIN_S = 60  # streams in flight at the end may end: the server's histograms know them all


@dataclass(frozen=True, slots=True)
class Compared:
    """One quantity as Locust and another saw it, in milliseconds if it is a time."""

    what: str
    locust: float
    other: float

    @property
    def difference(self) -> float:
        """Of Locust's from the other's, relative."""
        return self.locust / self.other - 1 if self.other else math.inf


@dataclass(frozen=True, slots=True)
class Verdict:
    """The medians of all rounds, and of their differences."""

    beside: str
    what: str
    locust: float
    other: float
    difference: float
    bound: float

    @property
    def is_kept(self) -> bool:
        """The bound is."""
        return abs(self.difference) <= self.bound


def histograms(exposition: str) -> dict[str, tuple[float, float]]:
    """(sum, count) of every histogram in a scrape, over all its labels."""
    found: dict[str, dict[str, float]] = {}
    for line in exposition.splitlines():
        if match := SAMPLE.match(line):
            name, part, _, value = match.groups()
            of_name = found.setdefault(name, {"sum": 0.0, "count": 0.0})
            of_name[part] += float(value)
    return {name: (parts["sum"], parts["count"]) for name, parts in found.items()}


def beside_server(
    before: dict[str, tuple[float, float]],
    after: dict[str, tuple[float, float]],
    samples: Sequence[Sample],
) -> list[Compared]:
    """Means over the same requests: the run is over, and every one of them has ended."""
    client = {
        "vitrine_time_to_first_token_seconds": [one.answered_s for one in samples],
        "vitrine_inter_token_latency_seconds": [gap for one in samples for gap in _gaps(one)],
        "vitrine_time_per_output_token_seconds": [one.tpot_s for one in samples],
        "vitrine_request_duration_seconds": [one.e2el_s for one in samples],
    }
    compared = []
    for name, values in client.items():
        known = [value for value in values if value is not None]
        total, count = (after.get(name, (0, 0))[i] - before.get(name, (0, 0))[i] for i in (0, 1))
        if not count or not known:
            raise SystemExit(f"/metrics has nothing new in {name}")
        what = name.removeprefix("vitrine_").removesuffix("_seconds").replace("_", " ")
        mean = math.fsum(known) / len(known)
        compared.append(Compared(f"{what}, mean", 1e3 * mean, 1e3 * total / count))
        compared.append(Compared(f"{what}, count", len(known), count))
    return compared


def _gaps(sample: Sample) -> list[float]:
    """A gap for each token but the first, as server and bench count them: those of one event came
    together for the reader, so that each takes its share of the pause before; behind the first
    token there is none."""
    behind_first = [0.0] * (sample.counts[0] - 1) if sample.counts else []
    return behind_first + [
        gap / count
        for gap, count in zip(sample.gaps_s, sample.counts[1:], strict=True)
        for _ in range(count)
    ]


def beside_bench(ran: Ran, alone: dict[str, float]) -> list[Compared]:
    """The steady states of both. `alone`: a result of `vitrine bench`."""
    begin_ns, end_ns = ran.window_ns
    samples = [one for one in ran.samples if begin_ns <= one.due_ns < end_ns]
    waits = [one.answered_s for one in samples if one.answered_s is not None]
    gaps = [gap for one in samples for gap in _gaps(one)]
    compared = [Compared("tokens/s", ran.point().tokens_per_s, alone["output_tokens_per_s"])]
    # Percentiles of waits that are counted in chunks jump by a whole step; the mean does not.
    mean_s = math.fsum(waits) / len(waits)
    compared.append(Compared("time to first token, mean", 1e3 * mean_s, 1e3 * alone["ttft_mean_s"]))
    for percent in (50, 99):
        seen = 1e3 * (percentile(gaps, percent) or math.nan)
        known = 1e3 * alone[f"itl_p{percent}_s"]
        compared.append(Compared(f"inter token latency, p{percent}", seen, known))
    return compared


def scrape(url: str) -> dict[str, tuple[float, float]]:
    """The histograms at this moment."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        return histograms(answer.read().decode())


def main() -> int:
    given = _arguments()
    engine = ["--threads", str(given.threads), "--dtype", given.dtype]
    with _model(given) as model:
        return _compare(given, [*engine, *model])


@contextmanager
def _model(given: argparse.Namespace) -> Iterator[list[str]]:
    """The flags that name the model; one of random weights is made and goes away."""
    if given.model is not None:
        yield ["--model", given.model]
    elif given.url is not None or given.shape == BUNDLED:
        yield []
    else:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "loadtests.report.checkpoints", given.shape, folder]
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                raise SystemExit(f"--shape {given.shape}: no checkpoint could be made of it")
            yield ["--model", str(Path(folder) / given.shape)]


def _compare(given: argparse.Namespace, engine: list[str]) -> int:
    plan = Plan(
        given.seconds,
        users=given.users,
        prompt_len=given.prompt_len,
        output_len=given.output_len,
        think_s=given.think_s,
        drain_s=DRAIN_S,
    )
    server_rounds, bench_rounds = list[list[Compared]](), list[list[Compared]]()
    engine_cores, others = _shares(given)
    with _on(others), target(given, *engine, "--max-events-s", "1e9") as server:
        _move_engine(server, engine_cores)
        run(server.url, Plan(WARM_S, users=given.users, output_len=16, prompt_len=16))
        for number in range(1, given.rounds + 1):  # the warm-up had the prompts of 0
            before = scrape(server.url)
            ran = run(server.url, replace(plan, seed=number))
            whole = [one for one in ran.samples if not one.was_cut]
            server_rounds.append(beside_server(before, scrape(server.url), whole))
            if given.url is None:
                with _on(engine_cores):
                    alone = _bench(given, engine, number, len(whole))
                bench_rounds.append(beside_bench(ran, alone))
            print(f"round {number}: {len(whole)} requests", flush=True)
    verdicts = _verdicts("server", server_rounds, given.within)
    verdicts += _verdicts("bench", bench_rounds, given.bench_within)
    Console(width=100).print(_table(verdicts))
    if given.out is not None:
        _write(given, verdicts, {"server": server_rounds, "bench": bench_rounds})
    return 0 if all(one.is_kept for one in verdicts) else 1


def _shares(given: argparse.Namespace) -> tuple[set[int], set[int]]:
    """The engine's cores, and everybody else's."""
    cores = sorted(os.sched_getaffinity(0))
    if given.url is not None:
        return set(cores), set(cores)
    if len(cores) <= given.threads:
        raise SystemExit(f"{len(cores)} cores: the engine's {given.threads} and one for the client")
    return set(cores[: given.threads]), set(cores[given.threads :])


@contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """What is started meanwhile runs there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _move_engine(server: Target, cores: set[int]) -> None:
    """The thread that computes; its others, of messages and clocks, stay where the API is, as the
    bench has none of them. Of several that compute, the others may run anywhere."""
    engine = None if server.api is None else server.engine()
    if engine is None:
        return
    for thread in engine.threads() if len(cores) > 1 else ():
        os.sched_setaffinity(thread.id, cores | os.sched_getaffinity(0))
    os.sched_setaffinity(engine.pid, cores)


def _bench(
    given: argparse.Namespace, engine: list[str], seed: int, num_requests: int
) -> dict[str, float]:
    """The same users without HTTP."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "service", "bench", *engine]
        command += ["--concurrency", str(given.users), "--think-s", str(given.think_s)]
        command += ["--seed", str(seed)]
        command += ["--prompt-len", str(given.prompt_len), "--output-len", str(given.output_len)]
        command += ["--num-requests", str(max(num_requests, 4 * given.users))]
        command += ["--warmup", "0", "--repeat", "1", "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (measured,) = json.loads(path.read_text())["measurements"]
    alone: dict[str, float] = measured["median"]
    return alone


def _verdicts(beside: str, rounds: Sequence[Sequence[Compared]], bound: float) -> list[Verdict]:
    """A verdict for each quantity."""
    return [
        Verdict(
            beside,
            same[0].what,
            median(one.locust for one in same),
            median(one.other for one in same),
            median(one.difference for one in same),
            bound,
        )
        for same in zip(*rounds, strict=True)
    ]


def _table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(title="Locust beside the server's histograms and `vitrine bench`; times in ms")
    table.add_column("beside")
    table.add_column("what")
    for name in ("Locust", "other", "difference", "bound", "verdict"):
        table.add_column(name, justify="right")
    for one in verdicts:
        is_time = not one.what.endswith(("count", "tokens/s"))
        cells = (f"{value:,.{3 if is_time else 0}f}" for value in (one.locust, one.other))
        verdict = "[green]kept[/]" if one.is_kept else "[bold red]missed[/]"
        numbers = (*cells, f"{one.difference:+.1%}", f"{one.bound:.0%}", verdict)
        table.add_row(one.beside, one.what, *numbers)
    return table


def _write(
    given: argparse.Namespace,
    verdicts: Sequence[Verdict],
    rounds: dict[str, list[list[Compared]]],
) -> None:
    settings: dict[str, Any] = {
        name: getattr(given, name)
        for name in ("model", "shape", "dtype", "threads", "users", "think_s", "seconds", "rounds")
    }
    if given.model is not None or given.url is not None:
        settings["shape"] = None  # it was not used
    settings |= {"prompt_len": given.prompt_len, "output_len": given.output_len}
    content = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "settings": settings,
        "verdicts": [asdict(one) | {"is_kept": one.is_kept} for one in verdicts],
        "rounds": {
            beside: [[asdict(one) for one in compared] for compared in every]
            for beside, every in rounds.items()
        },
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(content, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.load.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server_arguments(parser)
    parser.add_argument("--model", help="of server and bench, instead of a shape")
    parser.add_argument(
        "--shape",
        default="gpt2",
        help="of server and bench: a published one with random weights (gpt2, smollm-135m, "
        "qwen3-0.6b), or the bundled model",
    )
    parser.add_argument("--dtype", default="bfloat16", help="of both")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--users", type=int, default=8, help="streams at the same time")
    parser.add_argument("--think-s", type=float, default=1.5, help="mean pause of a user")
    parser.add_argument("--seconds", type=int, default=60, help="of Locust in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--within", type=float, default=0.05, help="of the server's histograms")
    parser.add_argument("--bench-within", type=float, default=0.10, help="of `vitrine bench`")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
