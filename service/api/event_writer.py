"""A generation's items as the events of /generate."""

from __future__ import annotations

import time

from msgspec import UNSET

from model.tokenizer import Tokenizer
from service.api import answers
from service.api.answers import DoneEvent, StartEvent, TokenEvent
from service.api.continuation import Delta, Done
from service.api.generation import Generation, Item
from service.api.sight import explanations
from service.api.sse import format_event


class EventWriter:
    """Writes a generation's items as events, numbered from 0."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, model_name: str) -> None:
        self.generation = generation
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._number = 0

    async def next_chunk(self) -> bytes | None:
        """The bytes of all events that are ready, at least one; None after the last."""
        events = await self.next_events()
        return b"".join(events) if events else None

    async def next_events(self) -> list[bytes]:
        """All events that are ready, at least one; an empty list after the last."""
        if self._number == 0:
            return [self._start()]
        return [self._event(item) for item in await self.generation.next()]

    def _start(self) -> bytes:
        plan = self.generation.plan
        return self._frame(
            "start",
            answers.encode(
                StartEvent(
                    id=plan.request_id,
                    model=self._model_name,
                    created=int(time.time()),
                    prompt_tokens=len(plan.prompt_token_ids),
                    seed=plan.seed,
                )
            ),
        )

    def _event(self, item: Item) -> bytes:
        if isinstance(item, Delta):
            logprobs = answers.logprobs(self._tokenizer, item.logprobs)
            heads = self.generation.plan.explain
            explained = explanations(self._tokenizer, item.explained, heads)
            event = TokenEvent(item.index, item.text, item.token_ids, logprobs, explained)
            return self._frame("token", answers.encode(event))
        if isinstance(item, Done):
            done = DoneEvent(
                index=item.index,
                finish_reason=item.finish_reason,
                text=item.text,
                usage=item.usage,
                timing=item.timing,
                stop_reason=UNSET if item.stop_reason is None else item.stop_reason,
            )
            return self._frame("done", answers.encode(done))
        problem = item.error.problem(self.generation.plan.request_id)
        return self._frame("error", answers.encode(problem))

    def _frame(self, event: str, data: bytes) -> bytes:
        framed = format_event(f"{self.generation.plan.request_id}:{self._number}", event, data)
        self._number += 1
        return framed
