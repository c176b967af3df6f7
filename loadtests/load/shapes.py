"""`--pattern` for Locust."""

from __future__ import annotations

from locust import LoadTestShape

from loadtests.load.patterns import FAST, Tick, tick_at


class Pattern(LoadTestShape):
    """The shape of every run; --users, --spawn-rate and --run-time count too."""

    use_common_options = True

    def tick(self) -> Tick:
        """See `tick_at`."""
        options = self.runner.environment.parsed_options  # type: ignore[union-attr]
        users, rate = options.num_users or 1, options.spawn_rate or FAST
        return tick_at(options, self.get_run_time(), users, rate)
