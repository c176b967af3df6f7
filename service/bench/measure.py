"""Drive the engine through a workload and write down every step and every token.

Nothing is computed while the engine runs; results.py does that from the record.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from model.sampling_params import SamplingParams
from service.bench.machine import CpuWatch
from service.bench.workload import Loop, Workload, make_loop, shared_prefix
from service.engine.core import EngineCore
from service.engine.messages import SequenceOutput, Submit
from service.engine.profile import StepProfile


class WorkloadError(Exception):
    """The engine refused or failed a request; the message says why."""


@dataclass(slots=True)
class RequestRecord:
    """One request; times are seconds after the run began."""

    prompt_len: int
    arrives_s: float
    token_times_s: list[float] = field(default_factory=list)
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step: its profile, the prompt tokens it computed, and the context lengths of the
    sequences that got a token from it."""

    profile: StepProfile
    num_prompt_tokens: int
    contexts: tuple[int, ...]

    @property
    def is_decode(self) -> bool:
        """Each of its tokens gave a sequence its next one: no prompts, nothing recomputed."""
        num_tokens = self.profile.num_tokens
        return self.num_prompt_tokens == 0 and 0 < num_tokens == len(self.contexts)


@dataclass(frozen=True, slots=True)
class Run:
    """A workload gone through once."""

    requests: list[RequestRecord]
    steps: list[StepRecord]
    elapsed_s: float
    preemptions: int
    foreign_cores: float | None  # processors that others kept busy meanwhile; None: unknown

    def steady_s(self, users: int) -> tuple[float, float]:
        """Of a closed loop, the time in which all its users are at it: from when as many requests
        have ended until the last one is sent."""
        ends = sorted(request.token_times_s[-1] for request in self.requests)
        return ends[users - 1], self.requests[-1].arrives_s


def run_workload(core: EngineCore, workload: Workload, number: int) -> Run:
    """One run; its `number` gives it prompts of its own. A shared prefix is in the cache
    when it begins, as a system prompt is on a server that has been running. Raises
    `WorkloadError`."""
    vocab_size = core.runner.config.vocab_size
    loop = make_loop(workload, vocab_size, number)
    if workload.shared_prefix_len:
        prefix = shared_prefix(workload, vocab_size, number)
        core.add(Submit(-1, prefix, SamplingParams(max_tokens=1)))
        while core.has_work:
            _check(core.step())
    return drive(core, loop)


def drive(core: EngineCore, loop: Loop) -> Run:
    """Add requests as they arrive, and step to the end."""
    requests: dict[int, RequestRecord] = {}
    steps: list[StepRecord] = []
    preemptions, prompt_tokens = core.scheduler.num_preemptions, core.stats().prompt_tokens
    watch = CpuWatch()
    began = time.perf_counter()
    while (due_s := loop.due_s()) is not None or core.has_work:
        now_s = time.perf_counter() - began
        while due_s is not None and due_s <= now_s:
            came = loop.take()
            num_prompt_tokens = len(came.request.prompt_token_ids)
            requests[came.request.id] = RequestRecord(num_prompt_tokens, came.arrives_s)
            core.add(came.request)
            due_s = loop.due_s()
        if not core.has_work:
            time.sleep(max(0.0, (due_s or 0.0) - (time.perf_counter() - began)))
            continue
        outputs = core.step()
        now_s = time.perf_counter() - began
        contexts = []
        for output in _check(outputs):
            record = requests[output.id]
            contexts.append(record.prompt_len + len(record.token_times_s))
            record.token_times_s += [now_s] * len(output.token_ids)
            record.cached_prompt_tokens = output.cached_prompt_tokens
            if output.finish_reason is not None:
                loop.ended(output.id, now_s)
        total = core.stats().prompt_tokens
        steps.append(StepRecord(core.last_step, total - prompt_tokens, tuple(contexts)))
        prompt_tokens = total
    elapsed_s = time.perf_counter() - began
    return Run(
        requests=list(requests.values()),
        steps=steps,
        elapsed_s=elapsed_s,
        preemptions=core.scheduler.num_preemptions - preemptions,
        foreign_cores=watch.foreign_cores(),
    )


def _check(outputs: list[SequenceOutput]) -> list[SequenceOutput]:
    for output in outputs:
        if output.error is not None:
            raise WorkloadError(output.error)
    return outputs
