"""How load changes over time, with `--pattern`:

constant  --users of them for --run-time (Locust's own way)
steps     --step-users 1,4,16,64 for --step-s each
burst     --users, and --burst-users more for --burst-s in every --burst-every-s
soak      as constant; made for hours: `python -m loadtests.load.summary` shows whether times drift
poisson   requests come at random moments, --rate a second on average, whether or not earlier ones
          have ended (an open loop): a slow server gets no mercy
"""

from __future__ import annotations

import argparse

from locust import LoadTestShape
from locust.util.timespan import parse_timespan

Tick = tuple[int, float] | None
FAST = 1000.0  # users a second: at once


def tick_at(options: argparse.Namespace, now_s: float, users: int, spawn_rate: float) -> Tick:
    """Users wanted at a moment and how fast they come; None: it is over."""
    limit_s = _seconds(options.run_time)
    if options.pattern == "steps":
        wanted = [int(word) for word in options.step_users.split(",")]
        step = int(now_s // options.step_s)
        return (wanted[step], FAST) if step < len(wanted) else None
    if limit_s is not None and now_s >= limit_s:
        return None
    if options.pattern == "burst":
        is_burst = now_s % options.burst_every_s >= options.burst_every_s - options.burst_s
        return users + (options.burst_users if is_burst else 0), FAST
    if options.pattern == "poisson":
        return options.dispatchers, FAST
    return users, spawn_rate


def _seconds(run_time: str | float | None) -> float | None:
    return float(parse_timespan(run_time)) if isinstance(run_time, str) else run_time


class Pattern(LoadTestShape):
    """`--pattern` for Locust."""

    use_common_options = True

    def tick(self) -> Tick:
        """See `tick_at`."""
        options = self.runner.environment.parsed_options  # type: ignore[union-attr]
        users, rate = options.num_users or 1, options.spawn_rate or FAST
        return tick_at(options, self.get_run_time(), users, rate)
