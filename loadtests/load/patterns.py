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

Tick = tuple[int, float] | None
FAST = 1000.0  # users a second: at once


def tick_at(options: argparse.Namespace, now_s: float, users: int, spawn_rate: float) -> Tick:
    """Users wanted at a moment and how many come a second; None: it is over.

    Plain Python: to import Locust is to let gevent take the process over."""
    if options.pattern == "steps":
        wanted = [int(word) for word in options.step_users.split(",")]
        step = int(now_s // options.step_s)
        return (wanted[step], FAST) if step < len(wanted) else None
    if options.run_time is not None and now_s >= options.run_time:
        return None
    if options.pattern == "burst":
        is_burst = now_s % options.burst_every_s >= options.burst_every_s - options.burst_s
        return users + (options.burst_users if is_burst else 0), FAST
    if options.pattern == "poisson":
        return options.dispatchers, FAST
    return users, spawn_rate
