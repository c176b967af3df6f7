"""One continuation: what the engine gives for one sequence becomes what a client is told.

Free of any wire format: /generate and the OpenAI routes put these items into their own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from service.api.answers import Timing, Usage
from service.api.recent import TokenLog
from service.api.sight import sights
from service.api.text import AnswerText
from service.engine.explain_messages import Sight
from service.engine.messages import SequenceOutput, TokenLogprob
from service.journal import TokenStream

_SHORTEST_S = 1e-6  # of a clock that may not have ticked


@dataclass(slots=True)
class Times:
    """When things happened to a continuation, on the event loop's clock."""

    arrived_s: float  # the request
    queue_s: float = 0.0
    prefill_s: float = 0.0
    first_s: float | None = None  # None: no token yet
    last_s: float = 0.0
    seen_s: float = 0.0  # when something was last heard of it, or done to it

    def timing(self, num_tokens: int) -> Timing:
        """What a client is told of it. The engine tells of its queue with a first token: without
        one, all the time was waiting."""
        if self.first_s is None:
            return Timing(_rounded(self.seen_s - self.arrived_s), 0.0, None, 0.0, 0.0)
        running_s = max(self.last_s - self.arrived_s - self.queue_s, _SHORTEST_S)
        return Timing(
            queue_s=_rounded(self.queue_s),
            prefill_s=_rounded(self.prefill_s),
            time_to_first_token_s=_rounded(self.first_s - self.arrived_s),
            decode_s=_rounded(self.last_s - self.first_s),
            tokens_per_s=_rounded(num_tokens / running_s),
        )


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of a continuation; either may be empty, not both."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None  # parallel to token_ids; None: not asked for
    explained: list[Sight] | None = None  # likewise


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a continuation."""

    index: int
    finish_reason: str
    stop_reason: str | int | None
    text: str
    usage: Usage
    timing: Timing


class Continuation:
    """The state of one continuation on its way to the client."""

    def __init__(
        self,
        index: int,
        stream: TokenStream,
        answer: AnswerText,
        *,
        prefix: str,
        num_prompt_tokens: int,
        stop_token_ids: Collection[int],
        wants_logprobs: bool,
        explains: bool,
        arrived_s: float,
        log: TokenLog,
    ) -> None:
        """`prefix` comes before the first text (echo). Times are of the event loop's clock.
        Tokens are noted in `log`."""
        self.index = index
        self.stream = stream
        self.done: Done | None = None
        self.num_tokens = 0
        self._log = log
        self._answer = answer
        self._prefix = prefix
        self._num_prompt_tokens = num_prompt_tokens
        self._stop_token_ids = stop_token_ids
        self._wants_logprobs, self._explains = wants_logprobs, explains
        self.times = Times(arrived_s)
        self._num_cached = 0
        self._texts: list[str] = []

    def take(self, output: SequenceOutput, now_s: float) -> list[Delta | Done]:
        """What an output of the engine tells the client."""
        times = self.times
        times.seen_s = now_s
        times.queue_s = max(times.queue_s, output.queue_s)
        times.prefill_s = max(times.prefill_s, output.prefill_s)
        self._num_cached = max(self._num_cached, output.cached_prompt_tokens)
        ids = output.token_ids
        if ids:
            times.first_s = now_s if times.first_s is None else times.first_s
            times.last_s = now_s
        piece = self._answer.push(_without_stop_token(output))
        if piece.stop is not None:
            self.stream.cancel()
            kept = ids[: piece.num_tokens]
            return self._finish(piece.text, kept, output, "stop", piece.stop)
        if output.finish_reason is not None:
            rest = self._answer.finish()
            reason: str = output.finish_reason
            stop: str | int | None = None
            if rest.stop is not None and reason != "error":
                reason, stop = "stop", rest.stop
            elif output.stop_token_id in self._stop_token_ids:
                stop = output.stop_token_id
            return self._finish(piece.text + rest.text, ids, output, reason, stop)
        return self._delta(piece.text, ids, output)

    def end(self, finish_reason: str, now_s: float) -> list[Delta | Done]:
        """End it from our side, with what it has; the caller cancels the stream."""
        self.times.seen_s = now_s
        rest = self._answer.finish()
        return self._finish(rest.text, [], None, finish_reason, None)

    def _finish(
        self,
        text: str,
        ids: list[int],
        output: SequenceOutput | None,
        reason: str,
        stop: str | int | None,
    ) -> list[Delta | Done]:
        items = self._delta(text, ids, output)
        self.done = Done(
            self.index,
            reason,
            stop,
            "".join(self._texts),
            self.usage(),
            self.times.timing(self.num_tokens),
        )
        return [*items, self.done]

    def _delta(
        self, text: str, ids: list[int], output: SequenceOutput | None
    ) -> list[Delta | Done]:
        """`ids` are those of the output's tokens that count, from its first on."""
        text, self._prefix = self._prefix + text, ""
        if not text and not ids:
            return []
        self._texts.append(text)
        self.num_tokens += len(ids)
        self._log.extend(ids)
        kept = None
        if self._wants_logprobs:
            kept = ((output.logprobs if output is not None else None) or [])[: len(ids)]
            if len(kept) != len(ids):
                raise ValueError(f"{len(ids)} tokens came with {len(kept)} log-probabilities")
        explained = sights(output, len(ids)) if self._explains else None
        return [Delta(self.index, text, ids, kept, explained)]

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self._num_prompt_tokens, self._num_cached, self.num_tokens)


def combined(continuations: Sequence[Continuation]) -> tuple[Usage, Timing]:
    """Usage and timing of a whole request: the prompt counts once, tokens add up, and the times
    are those of the continuation that was first and of the token that was last."""
    usages = [one.usage() for one in continuations]
    usage = Usage(
        usages[0].prompt_tokens,
        max(usage.cached_prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
    )
    first = min(
        (one.times for one in continuations),
        key=lambda times: math.inf if times.first_s is None else times.first_s,
    )
    last_s = max(one.times.last_s for one in continuations)
    return usage, replace(first, last_s=last_s).timing(usage.completion_tokens)


def _without_stop_token(output: SequenceOutput) -> list[int]:
    """The ids that have text: a token that ended the sequence is no part of it."""
    ids = output.token_ids
    ended_by_token = output.finish_reason == "stop" and output.stop_token_id is not None
    if ended_by_token and ids and ids[-1] == output.stop_token_id:
        return ids[:-1]
    return ids


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
