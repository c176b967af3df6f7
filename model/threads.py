"""How the threads of torch's own loops (OpenMP's) wait for each other: decided here, once, before
torch is imported. The compiled forward has threads of its own (model/kernels/team.c); these compute
where there is none, and what the sampler does with many large rows.

Spinning for good starves whatever else runs on the cores (the API process, a neighbour); sleeping
at once costs a wake-up at each of the 60 parallel regions of a small model's step. A short spin,
some tens of microseconds, has neither fault: a decode step of gpt2 at batch 1 took 24 ms sleeping
at once, 16 ms with this spin, and 193 ms spinning ten times as long beside a busy neighbour
(loadtests/NOTES.md, 2026-11-21).
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPIN_COUNT = "10000"


def set_wait_policy(environment: MutableMapping[str, str]) -> None:
    """Put the choice into an environment that has none of its own."""
    if "OMP_WAIT_POLICY" not in environment and "GOMP_SPINCOUNT" not in environment:
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT
