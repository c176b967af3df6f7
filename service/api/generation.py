"""One request in flight: its continuations merged, its deadline, and its one end.

Nothing is queued here. `next` reads what each stream of the engine has ready, at most one
merged output each, and is called again only when the client took the last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from model.sampling_params import SamplingParams
from model.tokenizer import IncrementalDecoder, Tokenizer
from service.api.continuation import Continuation, Delta, Done
from service.api.errors import ProblemError, from_exception, invalid_field
from service.api.text import AnswerText, StopStrings
from service.client import Engine, EngineUnavailableError
from service.engine.messages import SequenceOutput
from service.journal import SequenceRequest
from service.metrics import Metrics, Outcome

log = logging.getLogger(__name__)

# How a request with several continuations ended: the first of these that one of them did.
_BY_WEIGHT = ("timeout", "cancelled", "length", "stop")


@dataclass(frozen=True, slots=True)
class Plan:
    """A request that was checked and fits: what to submit and how to answer it."""

    request_id: str
    prompt_token_ids: list[int]
    prefix: str  # comes before each continuation's text: the prompt, if it is echoed
    seed: int
    samplings: list[SamplingParams]  # one for each continuation
    stops: StopStrings
    priority: int
    arrived_s: float  # the event loop's clock
    timeout_s: float  # from arrival


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed; the last item."""

    error: ProblemError


Item = Delta | Done | Failed


class Generation:
    """One admitted request. Whoever made it calls `abort` at the end, whatever happened."""

    def __init__(
        self, plan: Plan, continuations: list[Continuation], house: ActiveGenerations
    ) -> None:
        """Of `ActiveGenerations.admit` alone."""
        self.plan = plan
        self.continuations = continuations
        self._house = house
        self._open = list(continuations)
        self._reads: dict[asyncio.Task[SequenceOutput], Continuation] = {}
        self._waiting: asyncio.Timeout | None = None
        self._ended_by: str | None = None  # our own reason to end it
        self._settled = False
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        # Not checked when the client reads: the engine's work must end though it never reads.
        self._deadline = loop.call_at(plan.arrived_s + plan.timeout_s, self.end, "timeout")

    @property
    def finished(self) -> bool:
        """Whether `next` gave the last item."""
        return self._settled

    async def next(self) -> list[Item]:
        """What is new, at least one item; an empty list when everything was said."""
        items: list[Item] = []
        while not items and not self._settled:
            try:
                for continuation, output in await self._read():
                    if continuation.done is None:  # another's error may have ended it
                        items += self._take(continuation, output)
            except Exception as error:
                if not isinstance(error, EngineUnavailableError):
                    log.exception("request %s failed", self.plan.request_id)
                return [*items, *self._fail(from_exception(error), "error")]
            if self._ended_by is not None:
                items += self._end_open(self._ended_by)
            if not self._open and not self._settled:
                reasons = {one.done.finish_reason for one in self.continuations if one.done}
                self._settle("finished", next(r for r in _BY_WEIGHT if r in reasons))
        return items

    def end(self, finish_reason: str) -> None:
        """End it from the server's side; the client gets what it has and this reason."""
        if self._settled or self._ended_by is not None:
            return
        self._ended_by = finish_reason
        for continuation in self._open:
            continuation.stream.cancel()
        if self._waiting is not None:
            self._waiting.reschedule(self._clock())

    def abort(self) -> None:
        """Nobody reads the answer any more. Does nothing to a request that has ended."""
        if not self._settled:
            self._settle("aborted", "")

    async def _read(self) -> list[tuple[Continuation, SequenceOutput]]:
        """At least one output, unless the request is ended meanwhile."""
        if self._ended_by is not None:
            return []
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await self._read_streams()
        except TimeoutError:
            if self._ended_by is None:
                raise
            return []
        finally:
            self._waiting = None

    async def _read_streams(self) -> list[tuple[Continuation, SequenceOutput]]:
        if len(self._open) == 1 and not self._reads:  # nothing to merge: no task needed
            return [(self._open[0], await self._open[0].stream.next())]
        being_read = set(self._reads.values())
        for continuation in self._open:
            if continuation not in being_read:
                task = asyncio.create_task(_next(continuation))
                self._reads[task] = continuation
        ready, _ = await asyncio.wait(self._reads, return_when=asyncio.FIRST_COMPLETED)
        outputs = [(self._reads.pop(task), task.result()) for task in ready]
        return sorted(outputs, key=lambda pair: pair[0].index)

    def _take(self, continuation: Continuation, output: SequenceOutput) -> Sequence[Item]:
        if output.finish_reason == "error":
            # The engine's words are for the operator: they may hold paths and addresses.
            log.error(
                "request %s, continuation %d: the engine says: %s",
                self.plan.request_id,
                continuation.index,
                output.error,
            )
        items = continuation.take(output, self._clock())
        self._house.metrics.generated(sum(len(i.token_ids) for i in items if isinstance(i, Delta)))
        if continuation.done is not None:
            self._open.remove(continuation)
        if output.finish_reason == "error":
            error = _sequence_error(continuation, self.plan, output)
            return [*items, *self._fail(error, "cancelled")]
        return items

    def _end_open(self, finish_reason: str) -> list[Item]:
        items: list[Item] = []
        for continuation in self._open:
            continuation.stream.cancel()
            items += continuation.end(finish_reason)
        self._open.clear()
        return items

    def _fail(self, error: ProblemError, others: str) -> list[Item]:
        """End everything with `error`; continuations still open end with the reason `others`."""
        items = [*self._end_open(others), Failed(error)]
        self._settle("failed", "")
        return items

    def _settle(self, outcome: Outcome, reason: str) -> None:
        """The one end of the request: counted once, and nothing of it goes on."""
        self._settled = True
        self._deadline.cancel()
        for continuation in self._open:
            continuation.stream.cancel()
        for task in self._reads:
            task.cancel()
            task.add_done_callback(_forget)
        self._reads.clear()
        self._house.forget(self)
        self._house.metrics.ended(outcome, reason)


class ActiveGenerations:
    """All requests in flight, and the door into the engine."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.metrics = metrics
        self._engine = engine
        self._active: set[Generation] = set()

    def admit(self, plan: Plan, tokenizer: Tokenizer) -> Generation:
        """Submit all continuations, or raise what `Engine.submit` raises."""
        requests = [
            SequenceRequest(plan.prompt_token_ids, sampling, plan.priority)
            for sampling in plan.samplings
        ]
        streams = self._engine.submit(requests, plan.timeout_s)
        continuations = []
        for index, (stream, sampling) in enumerate(zip(streams, plan.samplings, strict=True)):
            decoder = IncrementalDecoder(tokenizer, plan.prompt_token_ids)
            continuations.append(
                Continuation(
                    index,
                    stream,
                    AnswerText(decoder, plan.stops, sampling.min_tokens),
                    prefix=plan.prefix,
                    num_prompt_tokens=len(plan.prompt_token_ids),
                    stop_token_ids=sampling.stop_token_ids,
                    wants_logprobs=sampling.logprobs is not None,
                    arrived_s=plan.arrived_s,
                )
            )
        generation = Generation(plan, continuations, self)
        self._active.add(generation)
        self.metrics.accepted(len(plan.prompt_token_ids))
        return generation

    def forget(self, generation: Generation) -> None:
        """It has ended."""
        self._active.discard(generation)

    def __len__(self) -> int:
        return len(self._active)


async def _next(continuation: Continuation) -> SequenceOutput:
    return await continuation.stream.next()


def _forget(task: asyncio.Task[SequenceOutput]) -> None:
    """Look at a failure that no longer matters, or asyncio reports it as never looked at."""
    if not task.cancelled():
        task.exception()


def _sequence_error(continuation: Continuation, plan: Plan, output: SequenceOutput) -> ProblemError:
    grammar = plan.samplings[continuation.index].grammar
    if output.is_grammar_error and grammar is not None:
        return invalid_field(
            grammar.field,
            f"continuation {continuation.index} cannot go on after {continuation.num_tokens} "
            f"tokens: {output.error}",
        )
    return ProblemError(
        "generation-failed",
        500,
        f"the engine failed on continuation {continuation.index}; the server's log has this "
        "request id",
    )
