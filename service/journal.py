"""The journal: what the API process knows of each sequence in flight, enough to run it again.

A reader takes tokens from an entry at its own pace (`TokenStream`); the engine client adds
to it, and starts it anew on another engine when one dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from model.sampling_params import SamplingParams
from service.engine.messages import SequenceOutput, Submit, TokenLogprob


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One continuation to run."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0


class TokenStream(Protocol):
    """The outputs of one sequence, as the API reads them."""

    async def next(self) -> SequenceOutput:
        """Everything that came since the last call, merged into one output; waits while
        there is nothing. The output with a `finish_reason` is the last."""
        ...

    def cancel(self) -> None:
        """Stop generating and free its blocks. Harmless when already finished."""
        ...


@dataclass(slots=True, eq=False)
class JournalEntry:
    """A sequence in flight: what is needed to run it again, and what its reader has not
    yet taken. Implements `TokenStream`."""

    id: int
    request: SequenceRequest
    drop: Callable[[JournalEntry], None]
    token_ids: list[int] = field(default_factory=list)  # all received
    is_sent: bool = False  # to the engine that runs now
    deaths: int = 0  # of engines that had it, since its last output
    _taken: int = 0  # of token_ids
    _logprobs: list[TokenLogprob] = field(default_factory=list)  # not yet taken
    _last: SequenceOutput | None = None
    _timing: tuple[float, float] = (0.0, 0.0)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def next(self) -> SequenceOutput:
        await self._news.wait()
        self._news.clear()
        last = self._last
        if last is None:
            raise RuntimeError(f"sequence {self.id} was woken without an output")
        token_ids = self.token_ids[self._taken :]
        logprobs, self._logprobs = self._logprobs, []
        self._taken = len(self.token_ids)
        return SequenceOutput(
            id=self.id,
            token_ids=token_ids,
            logprobs=logprobs if self.request.sampling.logprobs is not None else None,
            finish_reason=last.finish_reason,
            stop_token_id=last.stop_token_id,
            error=last.error,
            is_grammar_error=last.is_grammar_error,
            cached_prompt_tokens=last.cached_prompt_tokens,
            queue_s=self._timing[0],
            prefill_s=self._timing[1],
        )

    def cancel(self) -> None:
        self.drop(self)

    def receive(self, output: SequenceOutput) -> None:
        """Book what the engine sent."""
        if not self.token_ids and output.token_ids:
            self._timing = (output.queue_s, output.prefill_s)
        self.token_ids += output.token_ids
        self._logprobs += output.logprobs or []
        self._last = output
        self._news.set()

    def to_submit(self) -> Submit:
        """The message that starts this sequence, or starts it again where it was."""
        return Submit(
            self.id,
            self.request.prompt_token_ids,
            self.request.sampling,
            self.request.priority,
            self.token_ids,
        )
