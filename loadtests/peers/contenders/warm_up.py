"""Warm up, then measure: the same for every contender that runs in its own process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from loadtests.peers.machine import busy_s
from loadtests.peers.work import Measurement, Work

WARM_UP_TOKENS = 8

Run = Callable[[list[list[int]], int], Measurement]


def warmed(work: Work, run: Run) -> Iterator[Measurement]:
    """`run(prompts, output_tokens)` once briefly and once in full for every batch size, with
    the CPU time that other processes used during the latter."""
    for batch in work.batches:
        run(work.prompts(batch, salt=0), min(WARM_UP_TOKENS, work.output_tokens))
        before, began = busy_s(), time.perf_counter()
        own_before = time.process_time()
        measurement = run(work.prompts(batch, salt=1), work.output_tokens)
        if before is None:
            yield measurement
            continue
        others_s = (busy_s() or 0.0) - before - (time.process_time() - own_before)
        yield replace(
            measurement, others_cpu=round(max(0.0, others_s) / (time.perf_counter() - began), 2)
        )
