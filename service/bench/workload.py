"""What the benchmark asks of the engine: random prompts and the moments they arrive.

Plain Python, and a function of its seed: the same workload twice is the same requests.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from model.sampling_params import SamplingParams
from service.engine.messages import Submit


@dataclass(frozen=True, slots=True)
class Workload:
    """One measurement's requests, all of the same lengths (in tokens)."""

    batch: int  # requests in flight at most; the next one waits for its turn
    num_requests: int
    prompt_len: int
    output_len: int
    rate: float | None  # requests/s, Poisson arrivals; None: all at once
    shared_prefix_len: int  # tokens that all prompts begin with
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and when it comes, in seconds after the measurement began."""

    arrives_s: float
    request: Submit


def make_arrivals(workload: Workload, vocab_size: int, run: int) -> list[Arrival]:
    """The requests in the order they come.

    Every run (a number) has prompts of its own, so that none is found in the cache of the
    one before, and the same times of arrival, so that repeats can be compared.
    """
    clock = random.Random(f"{workload.seed} arrivals")  # noqa: S311 - no secrets here
    tokens = _token_source(workload, run)
    prefix = shared_prefix(workload, vocab_size, run)
    arrivals, now_s = [], 0.0
    for index in range(workload.num_requests):
        if workload.rate is not None and index > 0:
            now_s += clock.expovariate(workload.rate)
        rest = (tokens.randrange(vocab_size) for _ in range(workload.prompt_len - len(prefix)))
        params = SamplingParams(
            max_tokens=workload.output_len,
            temperature=workload.temperature,
            seed=index,
            ignore_eos=True,
        )
        arrivals.append(Arrival(now_s, Submit(index, prefix + list(rest), params)))
    return arrivals


def shared_prefix(workload: Workload, vocab_size: int, run: int) -> list[int]:
    """The tokens that all prompts of a run begin with."""
    tokens = _token_source(workload, run, "prefix")
    return [tokens.randrange(vocab_size) for _ in range(workload.shared_prefix_len)]


def _token_source(workload: Workload, run: int, purpose: str = "prompts") -> random.Random:
    return random.Random(f"{workload.seed} {run} {purpose}")  # noqa: S311
