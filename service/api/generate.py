"""POST /generate: continue a prompt, streamed or in one answer."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from model.tokenizer import Tokenizer
from service.api import answers
from service.api.admission import make_plan, rejections_counted
from service.api.answers import Choice, DoneEvent, GenerateAnswer, StartEvent, TokenEvent
from service.api.body import read_json
from service.api.context import ApiContext
from service.api.continuation import Delta, Done, combined
from service.api.disconnect import run_while_connected
from service.api.errors import request_id_of
from service.api.generation import Failed, Generation
from service.api.openapi import describe
from service.api.schemas import GenerateRequest
from service.api.sse import EventStreamResponse, format_event
from service.api.visit import visit_of
from service.engine.messages import TokenLogprob

DESCRIPTION = """Continues a prompt.

With `stream: true` (the default) the answer is an event stream: `start`, `token` events, one
`done` for each continuation; or an `error` as the last event. The `text` of an index's `token`
events concatenates to exactly its `done.text`. Closing the connection cancels the request."""


def routes(context: ApiContext) -> APIRouter:
    """The route, on these parts."""
    router = APIRouter(tags=["generate"])

    @router.post(
        "/generate",
        summary="Continue a prompt",
        description=DESCRIPTION,
        **describe(GenerateRequest, GenerateAnswer, events=(StartEvent, TokenEvent, DoneEvent)),
    )
    async def generate(request: Request) -> Response:
        arrived_s = asyncio.get_running_loop().time()
        with rejections_counted(context.metrics):
            body = await read_json(request, GenerateRequest)
            plan = await make_plan(body, context, request_id_of(request), arrived_s)
            tokenizer, _ = context.loaded()
            generation = context.generations.admit(plan, tokenizer, visit_of(request))
        # From here on the request is in flight: no await before somebody will call `abort`.
        if body.stream:
            events = EventWriter(generation, tokenizer, context.model_name)
            return EventStreamResponse(
                events.next_chunk, generation.abort, context.limits.keep_alive_s
            )
        try:
            answer = await run_while_connected(
                _whole_answer(generation, tokenizer, context.model_name), request.receive
            )
        finally:
            generation.abort()
        return Response(answers.encode(answer), media_type="application/json")

    return router


class EventWriter:
    """Writes a generation's items as events, numbered from 0."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, model_name: str) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._number = 0

    async def next_chunk(self) -> bytes | None:
        """The bytes of all events that are ready, at least one; None after the last."""
        if self._number == 0:
            return self._start()
        items = await self._generation.next()
        if not items:
            return None
        return b"".join([self._event(item) for item in items])

    def _start(self) -> bytes:
        plan = self._generation.plan
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

    def _event(self, item: Delta | Done | Failed) -> bytes:
        if isinstance(item, Delta):
            logprobs = answers.logprobs(self._tokenizer, item.logprobs)
            event = TokenEvent(item.index, item.text, item.token_ids, logprobs)
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
        problem = item.error.problem(self._generation.plan.request_id)
        return self._frame("error", answers.encode(problem))

    def _frame(self, event: str, data: bytes) -> bytes:
        framed = format_event(f"{self._generation.plan.request_id}:{self._number}", event, data)
        self._number += 1
        return framed


async def _whole_answer(
    generation: Generation, tokenizer: Tokenizer, model_name: str
) -> GenerateAnswer:
    """Wait for all continuations. Raises `ProblemError` when one failed."""
    plan = generation.plan
    token_ids: list[list[int]] = [[] for _ in plan.samplings]
    logprobs: list[list[TokenLogprob]] = [[] for _ in plan.samplings]
    done: dict[int, Done] = {}
    while items := await generation.next():
        for item in items:
            if isinstance(item, Delta):
                token_ids[item.index] += item.token_ids
                logprobs[item.index] += item.logprobs or []
            elif isinstance(item, Done):
                done[item.index] = item
            else:
                raise item.error
    usage, timing = combined(generation.continuations)
    return GenerateAnswer(
        id=plan.request_id,
        model=model_name,
        created=int(time.time()),
        seed=plan.seed,
        choices=[
            Choice(
                index=index,
                text=one.text,
                token_ids=token_ids[index],
                finish_reason=one.finish_reason,
                stop_reason=UNSET if one.stop_reason is None else one.stop_reason,
                logprobs=(
                    UNSET
                    if plan.samplings[index].logprobs is None
                    else answers.logprobs(tokenizer, logprobs[index])
                ),
            )
            for index, one in sorted(done.items())
        ],
        usage=usage,
        timing=timing,
    )
