"""One request in flight: its continuations merged, its deadline, and its one end.

Nothing is queued here. `next` takes what each stream of the engine has ready, at most one
merged output each, and is called again only when the client took the last.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams
from model.tokenizer import IncrementalDecoder, Tokenizer
from service.api.continuation import Continuation, Delta, Done, Times
from service.api.errors import ProblemError, from_exception, invalid_field
from service.api.recent import RecentRequests, RequestKey
from service.api.text import AnswerText, StopStrings
from service.client import Engine, EngineUnavailableError
from service.engine.messages import SequenceOutput
from service.journal import SequenceRequest
from service.metric_recording import Metrics
from service.metrics import AbortReason, Outcome

log = logging.getLogger(__name__)

# How a request with several continuations ended: the first of these that one of them did.
_BY_WEIGHT = ("timeout", "cancelled", "length", "stop")
_MAX_CANCELLED = 1024


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
    owner: str | None = None  # the API key that may resume and cancel it; None: no keys
    # (layer, head) that it is told of beside the mean of all; None: nothing of what tokens see.
    explain: list[tuple[int, int]] | None = None

    @property
    def key(self) -> RequestKey:
        return self.owner, self.request_id

    @property
    def num_tokens(self) -> int:
        """What it may take at most: the prompt, and max_tokens of each continuation."""
        return len(self.prompt_token_ids) + sum(one.max_tokens for one in self.samplings)


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed; the last item."""

    error: ProblemError


Item = Delta | Done | Failed


class Ticket(Protocol):
    """What a caller has for a request that began."""

    def withdraw(self) -> None:
        """The engine did not take it."""
        ...

    def ended(self, generation: Generation, outcome: Outcome) -> None:
        """It ended; called once."""
        ...


class Caller(Protocol):
    """Whoever a request is for: asked before it begins, and told how it ended."""

    @property
    def route(self) -> str:
        """The way it came in, one of few."""
        ...

    def begin(self, num_tokens: int) -> Ticket:
        """`num_tokens` is what the request may take at most. Raises `ProblemError` when the
        caller may not have it now."""
        ...


class Generation:
    """One admitted request. Whoever made it calls `abort` at the end, whatever happened."""

    def __init__(
        self,
        plans: list[Plan],
        continuations: list[Continuation],
        house: ActiveGenerations,
        ticket: Ticket,
        route: str,
    ) -> None:
        """Of `ActiveGenerations.admit` alone."""
        plan = plans[0]
        self.plan = plan
        self.plans = plans  # one for each prompt of the request; the first is `plan`
        self.continuations = continuations
        self._grammars = [one.grammar for plan in plans for one in plan.samplings]
        self._house = house
        self._ticket = ticket
        self._route = route
        self._open = list(continuations)
        self._settled = False
        self._has_begun = False  # its first token came
        self._last_items: list[Item] = []  # of a request that we ended, until they are read
        self._news = asyncio.Event()
        for continuation in continuations:
            continuation.stream.notify(self._news)
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        # Not checked when the client reads: the request must end though it never reads.
        self._deadline = loop.call_at(plan.arrived_s + plan.timeout_s, self.end, "timeout")

    @property
    def num_tokens_used(self) -> int:
        """Its prompt, and all that the engine generated for it, read or not."""
        generated = sum(one.stream.num_received for one in self.continuations)
        return sum(len(plan.prompt_token_ids) for plan in self.plans) + generated

    async def next(self) -> list[Item]:
        """What is new, at least one item; an empty list when everything was said."""
        while True:
            if not self._settled:
                await self._news.wait()
            self._news.clear()
            items, self._last_items = self._last_items, []
            if not self._settled:
                items += self._take_all()
            if items or self._settled:
                return items

    def end(self, finish_reason: str) -> None:
        """End it from the server's side, now: the client gets what had come and this reason."""
        if self._settled:
            return
        items = self._take_all()
        if not self._settled:
            items += self._end_open(finish_reason)
            self._settle("finished", finish_reason)
        self._last_items += items
        self._news.set()

    def fail(self, error: ProblemError) -> None:
        """End it from the server's side with what had come, and `error`."""
        if self._settled:
            return
        items = self._take_all()
        if not self._settled:
            items += self._fail(error, "error")
        self._last_items += items
        self._news.set()

    def abort(self, reason: AbortReason = "client-gone") -> None:
        """Nobody reads the answer any more. Does nothing to a request that has ended."""
        if not self._settled:
            self._settle("aborted", reason)
            self._news.set()

    def _take_all(self) -> list[Item]:
        """What the engine has for us, which may be the end."""
        items: list[Item] = []
        try:
            for continuation in tuple(self._open):
                # Another's error may have ended it.
                if continuation.done is None and (output := continuation.stream.take()):
                    items += self._take(continuation, output)
        except Exception as error:
            if not isinstance(error, EngineUnavailableError):
                log.exception("request %s failed", self.plan.request_id)
            return [*items, *self._fail(from_exception(error), "error")]
        if not self._open and not self._settled:
            reasons = {one.done.finish_reason for one in self.continuations if one.done}
            self._settle("finished", next(r for r in _BY_WEIGHT if r in reasons))
        return items

    def _take(self, continuation: Continuation, output: SequenceOutput) -> Sequence[Item]:
        if output.finish_reason == "error":
            # The engine's words are for the operator: they may hold paths and addresses.
            log.error(
                "request %s, continuation %d: the engine says: %s",
                self.plan.request_id,
                continuation.index,
                output.error,
            )
        is_first = continuation.times.first_s is None
        num_before = continuation.num_tokens
        items = continuation.take(output, self._clock())
        self._house.metrics.generated(continuation.num_tokens - num_before)
        if is_first and continuation.times.first_s is not None:
            self._began(continuation.times, continuation.times.first_s)
        if continuation.done is not None:
            self._open.remove(continuation)
            self._ended(continuation)
        if output.finish_reason == "error":
            error = _sequence_error(continuation, self._grammars[continuation.index], output)
            return [*items, *self._fail(error, "cancelled")]
        return items

    def _began(self, times: Times, first_s: float) -> None:
        """The first token of a continuation came."""
        metrics, request_id = self._house.metrics, self.plan.request_id
        metrics.sequence_began(request_id, times.queue_s, times.prefill_s)
        if not self._has_begun:
            self._has_begun = True
            metrics.began(self._route, request_id, first_s - times.arrived_s)

    def _ended(self, continuation: Continuation) -> None:
        """A continuation was answered to its end, be it with an error."""
        times, metrics = continuation.times, self._house.metrics
        if times.first_s is not None:
            decode_s = times.last_s - times.first_s
            metrics.sequence_ended(
                self._route, self.plan.request_id, decode_s, continuation.num_tokens
            )

    def _end_open(self, finish_reason: str) -> list[Item]:
        items: list[Item] = []
        for continuation in self._open:
            continuation.stream.cancel()
            items += continuation.end(finish_reason, self._clock())
            self._ended(continuation)
        self._open.clear()
        return items

    def _fail(self, error: ProblemError, others: str) -> list[Item]:
        """End everything with `error`; continuations still open end with the reason `others`."""
        items = [*self._end_open(others), Failed(error)]
        self._settle("failed", "")
        return items

    def _num_cached_tokens(self) -> int:
        """Of its prompts, each counted once."""
        usages = iter([one.usage().cached_prompt_tokens for one in self.continuations])
        return sum(max(next(usages) for _ in plan.samplings) for plan in self.plans)

    def _settle(self, outcome: Outcome, reason: str) -> None:
        """The one end of the request: counted once, and nothing of it goes on."""
        self._settled = True
        self._deadline.cancel()
        for continuation in self._open:
            continuation.times.seen_s = self._clock()
            continuation.stream.cancel()
        self._house.forget(self)
        self._house.metrics.ended(
            self._route,
            self.plan.request_id,
            outcome,
            reason,
            duration_s=self._clock() - self.plan.arrived_s,
            num_cached=self._num_cached_tokens(),
        )
        self._ticket.ended(self, outcome)


class ActiveGenerations:
    """All requests in flight, and the door into the engine."""

    def __init__(self, engine: Engine, metrics: Metrics, recent: RecentRequests) -> None:
        self.metrics = metrics
        self._recent = recent
        self._engine = engine
        self._active: set[Generation] = set()
        # Ids that were cancelled lately, so that cancelling twice is answered as once.
        self._cancelled: OrderedDict[RequestKey, None] = OrderedDict()

    def admit(self, plans: list[Plan], tokenizer: Tokenizer, caller: Caller) -> Generation:
        """Submit all continuations, or raise what `Caller.begin` or `Engine.submit` raises.

        `plans` are the prompts of one request, whose continuations are counted through; all are
        admitted or none.
        """
        planned = [(one, sampling) for one in plans for sampling in one.samplings]
        requests = [
            SequenceRequest(one.prompt_token_ids, sampling, one.priority, one.explain)
            for one, sampling in planned
        ]
        ticket = caller.begin(sum(plan.num_tokens for plan in plans))
        try:
            streams = self._engine.submit(requests, plans[0].timeout_s)
        except Exception:
            ticket.withdraw()
            raise
        logs = self._recent.add(plans[0].key, [one.prompt_token_ids for one, _ in planned])
        continuations = []
        for index, (stream, (one, sampling)) in enumerate(zip(streams, planned, strict=True)):
            decoder = IncrementalDecoder(tokenizer, one.prompt_token_ids)
            continuations.append(
                Continuation(
                    index,
                    stream,
                    AnswerText(decoder, one.stops, sampling.min_tokens),
                    prefix=one.prefix,
                    num_prompt_tokens=len(one.prompt_token_ids),
                    stop_token_ids=sampling.stop_token_ids,
                    wants_logprobs=sampling.logprobs is not None,
                    explains=one.explain is not None,
                    arrived_s=one.arrived_s,
                    log=logs[index],
                )
            )
        generation = Generation(plans, continuations, self, ticket, caller.route)
        self._active.add(generation)
        self.metrics.accepted(caller.route, sum(len(one.prompt_token_ids) for one in plans))
        return generation

    def is_active(self, key: RequestKey) -> bool:
        """Whether a request with this id is in flight."""
        return any(one.plan.key == key for one in self._active)

    def cancel(self, key: RequestKey) -> bool:
        """End every request with this id as cancelled; whether there was one, now or lately."""
        found = [one for one in self._active if one.plan.key == key]
        for generation in found:
            generation.end("cancelled")
        if found:
            self._cancelled[key] = None
            if len(self._cancelled) > _MAX_CANCELLED:
                self._cancelled.popitem(last=False)
        return key in self._cancelled

    def forget(self, generation: Generation) -> None:
        """It has ended."""
        self._active.discard(generation)

    def __len__(self) -> int:
        return len(self._active)


def _sequence_error(
    continuation: Continuation, grammar: GrammarSpec | None, output: SequenceOutput
) -> ProblemError:
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
