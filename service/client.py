"""The API's side of the engine: what the routes see of it, and who may send it a request.

When the engine process dies, another takes its place (`supervisor.py`) and the unfinished
sequences go on from where the journal says they were (`in_flight.py`): noise is a function of
(seed, position, token), so the tokens are the ones the first engine would have drawn.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from service.backlog import Backlog
from service.engine.explain_messages import Explained, ExplainPart, ExplainWish
from service.engine.messages import EngineConfig, EngineStats, Measured, ModelInfo, StepOutput
from service.engine_record import EngineRecord
from service.explanations import Explanation, Explanations
from service.health import EngineHealth, EngineState
from service.in_flight import InFlight, Loss
from service.journal import SequenceRequest, TokenStream
from service.supervisor import Supervisor

__all__ = [
    "Engine",
    "EngineClient",
    "EngineState",
    "EngineUnavailableError",
    "NeverFitsError",
    "QueueFullError",
]


MAX_CONTINUATIONS = 16  # of a prompt; an empty house takes them all, however small it is
# A server that ends answers no more; another in its place may.
RETRY_ELSEWHERE_S = 5.0


class QueueFullError(Exception):
    """No room for another request now; `retry_after_s` is when there may be."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailableError(Exception):
    """The engine is starting, draining or failed; the message says which."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NeverFitsError(ValueError):
    """The request could never run here; the message has the numbers, `field` the culprit."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class Engine(Protocol):
    """What the routes see of the engine; `EngineClient` is the real one."""

    @property
    def info(self) -> ModelInfo | None:
        """None until the model is loaded."""
        ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def state(self) -> EngineState: ...

    @property
    def state_reason(self) -> str:
        """Why the engine cannot take a request now, in words; empty when it can."""
        ...

    @property
    def health(self) -> EngineHealth:
        """State, heartbeat and replacements, for metrics."""
        ...

    @property
    def record(self) -> EngineRecord:
        """What all engines so far have done, for metrics."""
        ...

    def submit(self, requests: list[SequenceRequest], timeout_s: float) -> list[TokenStream]:
        """Admit all of them or none; `timeout_s` is how long they may take.

        Raises `QueueFullError`, `EngineUnavailableError` or `NeverFitsError`.
        """
        ...

    def explain(self, token_ids: list[int], wish: ExplainWish, timeout_s: float) -> Explanation:
        """Admit an explanation; it is computed in what time the streams leave.

        Raises `QueueFullError` or `EngineUnavailableError`.
        """
        ...


class EngineClient:
    """Owns the engine process and everything in flight; implements `Engine`."""

    def __init__(
        self,
        *,
        max_in_flight: int,
        stall_s: float,
        max_queue_tokens: int | None = None,
        standby: bool = False,
        max_explanations: int = 8,
    ) -> None:
        self.max_in_flight = max_in_flight
        self.max_explanations = max_explanations
        self.max_queue_tokens = max_queue_tokens
        self.failed = asyncio.Event()  # set when the engine cannot start at all
        self._supervisor = Supervisor(self, stall_s=stall_s, standby=standby)
        self._backlog = Backlog()
        self.record = EngineRecord()
        self._in_flight = InFlight(self._supervisor.send, self._backlog, self.record)
        self._explanations = Explanations(self._supervisor.send)
        self._stats = EngineStats()
        self._draining = False
        self._no_grace = asyncio.Event()

    @property
    def info(self) -> ModelInfo | None:
        return self._supervisor.info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def failure(self) -> str:
        """Why the engine cannot start at all; empty when it can."""
        return self._supervisor.failure

    @property
    def in_flight(self) -> int:
        """Sequences accepted and not yet ended."""
        return len(self._in_flight)

    @property
    def state(self) -> EngineState:
        phase = self._supervisor.phase
        if phase in ("stopped", "failed"):
            return phase
        if self._draining:
            return "draining"
        if phase != "ready":
            return phase
        if self._supervisor.is_silent:
            return "stalled"
        return "busy" if self.in_flight or self._explanations.num_unanswered else "idle"

    @property
    def state_reason(self) -> str:
        supervisor = self._supervisor
        death = supervisor.death.words if supervisor.death is not None else "died"
        match self.state:
            case "starting":
                return "the engine is loading the model"
            case "restarting":
                return f"the engine {death} and is being replaced"
            case "crash-loop":
                return (
                    f"the engine keeps dying; the last one {death}; the next one starts in "
                    f"{supervisor.next_try_s:.1f} s"
                )
            case "stalled":
                return f"the engine has not been heard for {supervisor.heartbeat_age_s:.1f} s"
            case "draining" | "stopped":
                return "the server is shutting down"
            case "failed":
                return "the engine cannot start; the server's log says why"
            case _:
                return ""

    @property
    def health(self) -> EngineHealth:
        supervisor = self._supervisor
        return EngineHealth(
            self.state,
            supervisor.heartbeat_age_s,
            supervisor.restarts,
            queue_requests=self._backlog.num_waiting,
            queue_tokens=self._backlog.num_waiting_tokens,
            pid=supervisor.pid,
        )

    def submit(self, requests: list[SequenceRequest], timeout_s: float) -> list[TokenStream]:
        self._admit(requests, timeout_s)
        return list(self._in_flight.add(requests))

    def explain(self, token_ids: list[int], wish: ExplainWish, timeout_s: float) -> Explanation:
        self._available()
        self._check_wait(timeout_s)
        count, limit = len(self._explanations), self.max_explanations
        if count >= limit:
            raise QueueFullError(
                f"{count} explanations run or wait; the limit is {limit}",
                retry_after_s=self._explanations.time_for(count - limit + 1),
            )
        return self._explanations.add(token_ids, wish)

    def spawn(self) -> None:
        """Start the engine process; it loads libraries while the caller goes on."""
        self._supervisor.spawn()

    def start(self, config: EngineConfig) -> None:
        """Begin supervising; needs a running event loop."""
        self._supervisor.start(config)

    def fail(self, reason: str) -> None:
        """The engine cannot start, and why, in words: `state` says so, `failed` is set, and
        whatever is in flight ends with an error."""
        self._supervisor.fail(reason)

    async def drain(self, grace_s: float) -> None:
        """Take nothing new and wait until what runs is done, at most `grace_s` or until
        `end_grace`; what is left then ends as cancelled, with the tokens it has."""
        self._draining = True
        waits = [
            asyncio.create_task(self._idle()),
            asyncio.create_task(self._no_grace.wait()),
        ]
        await asyncio.wait(waits, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        for entry in self._in_flight:
            self._in_flight.end(entry, "cancelled")
        self._explanations.end_all(EngineUnavailableError(self.state_reason, RETRY_ELSEWHERE_S))

    def end_grace(self) -> None:
        """Do not wait any longer for what runs."""
        self._no_grace.set()

    async def stop(self) -> None:
        """End the engine process."""
        self._draining = True
        await self._supervisor.stop()

    def engine_ready(self) -> None:
        """Of the supervisor alone, like those below."""
        self._in_flight.engine_ready()
        self._explanations.engine_ready()

    def engine_stepped(self, step: StepOutput) -> None:
        self._stats = step.stats
        for record in step.steps:
            self.record.stepped(record)
        now_s = time.monotonic()
        for output in step.outputs:
            self._in_flight.deliver(output, now_s)

    def engine_measured(self, measured: Measured) -> None:
        self.record.roofline = measured

    def engine_explained(self, message: ExplainPart | Explained) -> None:
        if isinstance(message, ExplainPart):
            self._explanations.take_part(message)
        else:
            self._explanations.take_answer(message)

    def engine_lost(self, loss: Loss) -> None:
        self._in_flight.engine_lost(loss)
        self._explanations.engine_lost(loss)
        self.record.lost(self._stats)
        self._stats = EngineStats()

    def engine_failed(self, reason: str) -> None:
        for entry in self._in_flight:
            self._in_flight.end(entry, "error", f"the engine cannot start: {reason}")
        self._explanations.end_all(EngineUnavailableError(self.state_reason, RETRY_ELSEWHERE_S))
        self.failed.set()

    async def _idle(self) -> None:
        await self._in_flight.nothing.wait()
        await self._explanations.nothing.wait()

    def _available(self) -> ModelInfo:
        """What runs, or soon will. Raises `EngineUnavailableError`."""
        state, info, wait_s = self.state, self.info, self._supervisor.wait_s
        if info is None or state not in ("idle", "busy", "stalled", "restarting"):
            raise EngineUnavailableError(self.state_reason, retry_after_s=max(2.0, wait_s))
        return info

    def _check_wait(self, timeout_s: float) -> None:
        wait_s = self._supervisor.wait_s
        if wait_s > timeout_s:
            raise EngineUnavailableError(self.state_reason, retry_after_s=max(1.0, wait_s))

    def _admit(self, requests: list[SequenceRequest], timeout_s: float) -> None:
        info = self._available()
        for request in requests:
            _check_fits(request, info)
        most = max(self.max_in_flight, MAX_CONTINUATIONS)
        if len(requests) > most:
            raise NeverFitsError(
                f"{len(requests)} continuations were asked for; this server runs or queues "
                f"{most} at most",
                field="n",
            )
        self._check_wait(timeout_s)
        excess = self.in_flight + len(requests) - self.max_in_flight
        if self.in_flight and excess > 0:
            raise QueueFullError(
                f"{self.in_flight} continuations are in flight and this request has "
                f"{len(requests)}; the limit is {self.max_in_flight}",
                retry_after_s=self._backlog.time_for_requests(min(self.in_flight, excess)),
            )
        self._admit_tokens(sum(request.num_tokens for request in requests))

    def _admit_tokens(self, num_tokens: int) -> None:
        """Bound the work that waits; a queue that is empty takes whatever fits the model."""
        waiting, limit = self._backlog.num_waiting_tokens, self.max_queue_tokens
        excess = 0 if limit is None else waiting + num_tokens - limit
        if waiting and excess > 0:
            raise QueueFullError(
                f"{waiting} tokens wait for their first step and this request has {num_tokens} "
                f"with its max_tokens; the limit is {limit}",
                retry_after_s=self._backlog.time_for_tokens(min(waiting, excess)),
            )


def _check_fits(request: SequenceRequest, info: ModelInfo) -> None:
    """Refuse what could never run, with the numbers (law 3)."""
    num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    if num_prompt + max_tokens > info.context_length:
        raise NeverFitsError(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; together "
            f"{num_prompt + max_tokens}, and the context length is {info.context_length}",
            field="max_tokens",
        )
    capacity = info.num_blocks * info.block_size
    if num_prompt + max_tokens > capacity:
        raise NeverFitsError(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; together "
            f"{num_prompt + max_tokens}, and the KV cache holds {capacity}",
            field="max_tokens",
        )
