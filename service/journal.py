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
from service.engine.explain_messages import Sight
from service.engine.messages import SequenceOutput, Submit, TokenLogprob


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One continuation to run."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    explain: list[tuple[int, int]] | None = None  # see `Submit`

    @property
    def num_tokens(self) -> int:
        """What it may take at most."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens


class TokenStream(Protocol):
    """The outputs of one sequence, as the API reads them. Nothing here waits, so nothing that
    came can be lost between a wait and its cancellation."""

    def notify(self, news: asyncio.Event) -> None:
        """Set `news` whenever there is something to take; at once if there is."""
        ...

    def take(self) -> SequenceOutput | None:
        """Everything that came since the last call, merged into one output; None when that is
        nothing. The output with a `finish_reason` is the last."""
        ...

    @property
    def num_received(self) -> int:
        """Tokens that the engine generated for it so far, whether they were read or not."""
        ...

    def cancel(self) -> None:
        """Stop generating and free its blocks; what came before may still be taken. Harmless
        when already finished."""
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
    was_sent: bool = False  # to any engine
    last_token_s: float | None = None  # when its latest token came; None: none did
    deaths: int = 0  # of engines that were computing it, since its last output
    kills: int = 0  # the same, killed from outside
    _num_taken: int = 0  # of token_ids
    _logprobs: list[TokenLogprob] = field(default_factory=list)  # not yet taken
    _explained: list[Sight] = field(default_factory=list)  # not yet taken
    _last: SequenceOutput | None = None  # None: nothing came since the last `take`
    _timing: tuple[float, float] = (0.0, 0.0)
    _news: asyncio.Event | None = None

    def notify(self, news: asyncio.Event) -> None:
        self._news = news
        if self._last is not None:
            news.set()

    def take(self) -> SequenceOutput | None:
        last, self._last = self._last, None
        if last is None:
            return None
        token_ids = self.token_ids[self._num_taken :]
        logprobs, self._logprobs = self._logprobs, []
        explained, self._explained = self._explained, []
        self._num_taken = len(self.token_ids)
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
            explained=explained if self.request.explain is not None else None,
        )

    @property
    def num_received(self) -> int:
        return len(self.token_ids)

    def cancel(self) -> None:
        self.drop(self)

    def receive(self, output: SequenceOutput) -> None:
        """Book what the engine sent."""
        if not self.token_ids and output.token_ids:
            self._timing = (output.queue_s, output.prefill_s)
        self.token_ids += output.token_ids
        if output.logprobs:
            self._logprobs += output.logprobs
        if output.explained:
            self._explained += output.explained
        self._last = output
        if self._news is not None:
            self._news.set()

    def to_submit(self) -> Submit:
        """The message that starts this sequence, or starts it again where it was."""
        return Submit(
            self.id,
            self.request.prompt_token_ids,
            self.request.sampling,
            self.request.priority,
            self.token_ids,
            self.request.explain,
        )
