"""One Locust run as a process of its own, and what came of it."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from loadtests.load.samples import Sample, read_samples
from loadtests.load.statistics import NS, Point, Slo, summarize

LOCUSTFILE = Path(__file__).parents[1] / "locustfile.py"
WARM_UP = 0.25  # of the run's time, not counted


class LoadError(Exception):
    """Locust did not run, or nothing came of it; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A closed loop of `users`, or with `rate` (requests/s) an open one."""

    seconds: int  # Locust takes whole ones only
    users: int = 1
    rate: float | None = None
    workload: str = "fixed"
    prompt_len: int = 64
    output_len: int = 64
    shared_len: int = 256
    think_s: float = 0.0
    user: str = "GenerateUser"
    drain_s: int = 0  # so long after it the requests in flight may end; else they are cut off
    processes: int = 1
    seed: int = 0
    api_key: str = ""


@dataclass(frozen=True, slots=True)
class Ran:
    """Every sample, and the processor seconds that the client took for each second."""

    plan: Plan
    samples: list[Sample]
    client_cores: float

    @property
    def window_ns(self) -> tuple[int, int]:
        """The run without its beginning, and without what came after its time."""
        first_ns = min(one.due_ns for one in self.samples)
        begin_ns = first_ns + int(WARM_UP * self.plan.seconds * NS)
        return begin_ns, first_ns + int(self.plan.seconds * NS)

    def point(self, slo: Slo | None = None) -> Point:
        """In this window."""
        return summarize(self.samples, *self.window_ns, slo)


def run(url: str, plan: Plan) -> Ran:
    """Load the server at `url`. Raises `LoadError`."""
    with tempfile.TemporaryDirectory(prefix="vitrine-load-") as folder:
        before, began = _children_s(), time.monotonic()
        done = subprocess.run(
            _command(url, plan, Path(folder)), capture_output=True, text=True, check=False
        )
        elapsed_s = time.monotonic() - began
        samples = read_samples(Path(folder))
    # 1: there were failures; they are in the samples.
    if done.returncode not in (0, 1) or not samples:
        raise LoadError(f"locust ended with {done.returncode}: {done.stderr.strip()[-600:]}")
    return Ran(plan, samples, (_children_s() - before) / elapsed_s)


def _command(url: str, plan: Plan, folder: Path) -> list[str]:
    words: dict[str, object] = {
        "--host": url,
        "--users": plan.users,
        "--spawn-rate": 1000,
        "--run-time": plan.seconds,
        "--workload": plan.workload,
        "--prompt-len": plan.prompt_len,
        "--output-len": plan.output_len,
        "--shared-len": plan.shared_len,
        "--think-s": plan.think_s,
        "--load-seed": plan.seed,
        "--samples": folder,
        "--loglevel": "ERROR",
    }
    if plan.rate is not None:
        words |= {"--pattern": "poisson", "--rate": plan.rate, "--dispatchers": plan.processes}
    if plan.drain_s:
        words |= {"--stop-timeout": plan.drain_s}
    if plan.processes > 1:
        words |= {"--processes": plan.processes}
    if plan.api_key:
        words |= {"--api-key": plan.api_key}
    start = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), plan.user]
    flags = [str(word) for pair in words.items() for word in pair]
    return [*start, *flags, "--headless", "--only-summary"]


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
