"""What the API process keeps of the engines' work, for metrics: sums over all engines there were.

An engine's own counters begin anew with each process; those here only grow. Plain Python, read at
a scrape (`service/metric_collectors.py`); a step costs a few microseconds.
"""

from __future__ import annotations

from typing import Literal, get_args

from service.buckets import SEQUENCES, TOKEN_SECONDS, TOKENS, Distribution
from service.engine.messages import EngineStats, Measured, StepRecord

# A step that only decodes, one that only computes prompts (or computes again what a preemption
# gave away), and one that does both. A chunk of a prompt that is one token counts as a decode.
Phase = Literal["decode", "prefill", "mixed"]
PHASES: tuple[Phase, ...] = get_args(Phase)
# Of an engine's time, see service/engine/profile.py.
PARTS = ("schedule", "build", "forward", "sample", "book")
# Counters of `EngineStats`.
TOTALS = (
    "steps",
    "preemptions",
    "memory_shortages",
    "prompt_tokens",
    "generated_tokens",
    "cache_queries",
    "cache_hits",
)


class PhaseRecord:
    """All steps of one phase."""

    __slots__ = ("flops", "least_s", "num_bytes", "sequences", "step_s", "tokens")

    def __init__(self) -> None:
        self.step_s = Distribution(TOKEN_SECONDS)
        self.sequences = Distribution(SEQUENCES)
        self.tokens = Distribution(TOKENS)
        self.num_bytes = 0.0
        self.flops = 0.0
        self.least_s = 0.0  # that the machine would need for both, by its roofline


class EngineRecord:
    """The books of one server."""

    def __init__(self) -> None:
        self.phases: dict[Phase, PhaseRecord] = {phase: PhaseRecord() for phase in PHASES}
        self.parts_s = dict.fromkeys(PARTS, 0.0)
        self.inter_token_s = Distribution(TOKEN_SECONDS)
        self.num_resumed = 0  # sequences that were given to another engine, where they were
        self.roofline: Measured | None = None  # None: not known
        self._past = dict.fromkeys(TOTALS, 0)  # of the engines before this one

    def stepped(self, step: StepRecord) -> None:
        """Book a step."""
        if step.num_decodes == step.num_sequences:
            phase = self.phases["decode"]
        elif step.num_decodes:
            phase = self.phases["mixed"]
        else:
            phase = self.phases["prefill"]
        phase.step_s.observe(step.step_s)
        phase.sequences.observe(step.num_sequences)
        phase.tokens.observe(step.num_tokens)
        phase.num_bytes += step.num_bytes
        phase.flops += step.flops
        roof = self.roofline
        if roof is not None:
            phase.least_s += max(
                step.num_bytes / roof.read_bytes_per_s, step.flops / roof.flops_per_s
            )
        parts_s = self.parts_s
        parts_s["schedule"] += step.schedule_s
        parts_s["build"] += step.build_s
        parts_s["forward"] += step.forward_s
        parts_s["sample"] += step.sample_s
        known_s = step.schedule_s + step.build_s + step.forward_s + step.sample_s
        parts_s["book"] += max(0.0, step.step_s - known_s)

    def lost(self, stats: EngineStats) -> None:
        """An engine ended; these were its last counters."""
        self._past = self.totals(stats)

    def totals(self, stats: EngineStats) -> dict[str, int]:
        """The counters of all engines; `stats` are those of the one that runs."""
        return {name: self._past[name] + getattr(stats, name) for name in TOTALS}
