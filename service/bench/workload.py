"""What the benchmark asks of the engine: random prompts and the moments they arrive.

Plain Python, and a function of its seed: the same workload twice is the same requests.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Protocol

from model.sampling_params import SamplingParams
from service.engine.messages import Submit


@dataclass(frozen=True, slots=True)
class Workload:
    """One measurement's requests, all of the same lengths (in tokens)."""

    batch: int  # requests in flight at most; the next one waits for its turn. Or users
    num_requests: int
    prompt_len: int
    output_len: int
    rate: float | None  # requests/s, Poisson arrivals; None: all at once
    shared_prefix_len: int  # tokens that all prompts begin with
    temperature: float
    seed: int
    is_closed: bool = False  # `batch` users, each with one request after the other
    think_s: float = 0.0  # between a user's requests, on average (exponentially distributed)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and when it comes, in seconds after the measurement began."""

    arrives_s: float
    request: Submit


class Loop(Protocol):
    """Who asks when."""

    def due_s(self) -> float | None:
        """When the next request comes. None: no more do, or none before another has ended."""

    def take(self) -> Arrival:
        """The next request."""

    def ended(self, request_id: int, now_s: float) -> None:
        """One of those taken has."""


class OpenLoop:
    """Requests come when they come; at most `batch` of them are in flight."""

    def __init__(self, arrivals: Iterable[Arrival], batch: int) -> None:
        self._waiting = deque(arrivals)
        self._free = batch

    def due_s(self) -> float | None:
        return self._waiting[0].arrives_s if self._waiting and self._free else None

    def take(self) -> Arrival:
        self._free -= 1
        return self._waiting.popleft()

    def ended(self, request_id: int, now_s: float) -> None:
        self._free += 1


class ClosedLoop:
    """Each of so many users thinks, asks, waits for the end, and begins again. `pauses` has each
    one's times of thinking, in seconds."""

    def __init__(self, requests: Iterable[Submit], pauses: Sequence[Iterator[float]]) -> None:
        self._waiting = deque(requests)
        self._pauses = pauses
        self._users: dict[int, int] = {}  # of the requests under way
        self._moments = [(next(pause), user) for user, pause in enumerate(pauses)]
        heapify(self._moments)

    def due_s(self) -> float | None:
        return self._moments[0][0] if self._waiting and self._moments else None

    def take(self) -> Arrival:
        (moment_s, user), request = heappop(self._moments), self._waiting.popleft()
        self._users[request.id] = user
        return Arrival(moment_s, request)

    def ended(self, request_id: int, now_s: float) -> None:
        user = self._users.pop(request_id)
        heappush(self._moments, (now_s + next(self._pauses[user]), user))


def make_loop(workload: Workload, vocab_size: int, run: int) -> Loop:
    """The requests of `make_arrivals`, and who sends them."""
    arrivals = make_arrivals(workload, vocab_size, run)
    if not workload.is_closed:
        return OpenLoop(arrivals, workload.batch)
    users = [pauses(workload.seed, user, workload.think_s) for user in range(workload.batch)]
    return ClosedLoop((arrival.request for arrival in arrivals), users)


def pauses(seed: int, user: int, mean_s: float) -> Iterator[float]:
    """How long a user thinks, again and again. Locust's users with the same seed and number think
    as long (loadtests/load/users.py), so that both can be compared pause for pause."""
    clock = random.Random(f"{seed} user {user} thinking")  # noqa: S311
    while True:
        yield clock.expovariate(1 / mean_s) if mean_s else 0.0


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
