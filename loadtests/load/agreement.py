"""Do three clocks tell the same time? Locust, the server's own histograms, and `vitrine bench`.

    python -m loadtests.load.agreement --users 16 --seconds 30

Starts a server (or takes --url, without the comparison with the bench, which needs the machine for
itself), runs Locust, and compares the means of its histograms over the run (sum and count are
exact, buckets are not) with those of the raw samples: within --within of each other, 5 percent.
Then the same model, lengths and number of sequences in `vitrine bench`: tokens/s, prefill and all,
within 10 percent; where client and server share the engine's cores, that is what HTTP costs.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtests.faults.common import add_server_arguments, target
from loadtests.load.run import Plan, run
from loadtests.load.samples import Sample
from loadtests.load.statistics import percentile

SAMPLE = re.compile(r"^(\w+?)_(sum|count)(?:\{(.*)\})? (\S+)$")


@dataclass(frozen=True, slots=True)
class Compared:
    """One quantity as the client and the server saw it."""

    what: str
    client: float
    server: float
    unit: str = "ms"

    @property
    def difference(self) -> float:
        """Of the client's from the server's, relative."""
        return self.client / self.server - 1 if self.server else math.inf


def histograms(exposition: str) -> dict[str, tuple[float, float]]:
    """(sum, count) of every histogram in a scrape, over all its labels."""
    found: dict[str, dict[str, float]] = {}
    for line in exposition.splitlines():
        if match := SAMPLE.match(line):
            name, part, _, value = match.groups()
            of_name = found.setdefault(name, {"sum": 0.0, "count": 0.0})
            of_name[part] += float(value)
    return {name: (parts["sum"], parts["count"]) for name, parts in found.items()}


def compare(
    before: dict[str, tuple[float, float]],
    after: dict[str, tuple[float, float]],
    samples: Sequence[Sample],
) -> list[Compared]:
    """Means over the same requests: the run is over, and every one of them has ended."""
    gaps = [gap for one in samples for gap in _token_gaps(one)]
    client = {
        "vitrine_time_to_first_token_seconds": [one.ttft_s for one in samples],
        "vitrine_inter_token_latency_seconds": gaps,
        "vitrine_time_per_output_token_seconds": [one.tpot_s for one in samples],
        "vitrine_request_duration_seconds": [one.e2el_s for one in samples],
    }
    compared = []
    for name, values in client.items():
        known = [value for value in values if value is not None]
        total = after.get(name, (0.0, 0.0))[0] - before.get(name, (0.0, 0.0))[0]
        count = after.get(name, (0.0, 0.0))[1] - before.get(name, (0.0, 0.0))[1]
        if not count or not known:
            continue
        what = name.removeprefix("vitrine_").removesuffix("_seconds").replace("_", " ")
        mean = math.fsum(known) / len(known)
        compared.append(Compared(f"{what}, mean", 1e3 * mean, 1e3 * total / count))
        compared.append(Compared(f"{what}, count", len(known), count, ""))
    return compared


def _token_gaps(sample: Sample) -> list[float]:
    """A gap for each token, as the server counts them: those of one event came together for the
    reader, so that each takes its share of the pause before."""
    return [
        gap / count
        for gap, count in zip(sample.gaps_s, sample.counts[1:], strict=True)
        for _ in range(count)
    ]


def scrape(url: str) -> dict[str, tuple[float, float]]:
    """The histograms at this moment."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        return histograms(answer.read().decode())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.load.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server_arguments(parser)
    parser.add_argument("--model", help="of server and bench; without it, the bundled one")
    parser.add_argument("--threads", type=int, help="of the engine; without it, torch's choice")
    parser.add_argument("--users", type=int, default=16, help="streams at the same time")
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--within", type=float, default=0.05, help="of the server's histograms")
    parser.add_argument("--bench-within", type=float, default=0.10, help="of `vitrine bench`")
    given = parser.parse_args()
    model = [] if given.model is None else ["--model", given.model]
    model += [] if given.threads is None else ["--threads", str(given.threads)]
    # Streams in flight at the end may end: the server's histograms know them all.
    plan = Plan(
        given.seconds,
        users=given.users,
        prompt_len=given.prompt_len,
        output_len=given.output_len,
        drain_s=60,
    )
    with target(given, *model) as server:
        run(server.url, Plan(3, users=given.users, output_len=16, prompt_len=16))  # warm
        before = scrape(server.url)
        ran = run(server.url, plan)
        after = scrape(server.url)
    whole = [one for one in ran.samples if not one.was_cut]
    compared = compare(before, after, whole)
    if not compared:
        raise SystemExit("the server has no histograms of its latencies in /metrics")
    if given.url is None:
        compared.append(_bench(given, model, ran.point().tokens_per_s))
    ok = [abs(one.difference) <= _limit(one, given) for one in compared]
    Console(width=100).print(_table(compared, ok))
    if given.out is not None:
        rows = [{"what": one.what, "client": one.client, "server": one.server} for one in compared]
        given.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(ok) else 1


def _limit(one: Compared, given: argparse.Namespace) -> float:
    limit: float = given.bench_within if "bench" in one.what else given.within
    return limit


def _bench(given: argparse.Namespace, model: list[str], tokens_per_s: float) -> Compared:
    """End-to-end tokens/s of the engine alone, prefill included, on as many sequences."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        lengths = ("--prompt-len", str(given.prompt_len), "--output-len", str(given.output_len))
        load = ("--batch", str(given.users), "--num-requests", str(4 * given.users))
        command = [sys.executable, "-m", "service", "bench", *model, *lengths, *load]
        subprocess.run([*command, "--json", str(path)], check=True, stdout=subprocess.DEVNULL)
        (measured,) = json.loads(path.read_text())["measurements"]
    alone = percentile([one["output_tokens_per_s"] for one in measured["repeats"]], 50) or 0.0
    return Compared("tokens/s, and of vitrine bench", tokens_per_s, alone, "")


def _table(compared: Sequence[Compared], ok: Sequence[bool]) -> Table:
    table = Table()
    table.add_column("what")
    for name in ("Locust", "server", "difference"):
        table.add_column(name, justify="right")
    for one, is_ok in zip(compared, ok, strict=True):
        digits = 3 if one.unit else 0
        cells = (f"{value:,.{digits}f} {one.unit}" for value in (one.client, one.server))
        colour = "green" if is_ok else "bold red"
        table.add_row(one.what, *cells, f"[{colour}]{one.difference:+.1%}[/]")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
