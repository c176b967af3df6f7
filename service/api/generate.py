"""POST /generate: continue a prompt, streamed or in one answer."""

from __future__ import annotations

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
from service.api.continuation import combined
from service.api.disconnect import run_while_connected
from service.api.errors import ProblemError, request_id_of
from service.api.event_writer import EventWriter
from service.api.generation import Generation
from service.api.identity import key_name_of
from service.api.openapi import describe
from service.api.recent import RequestKey
from service.api.schemas import GenerateRequest
from service.api.sight import explanations
from service.api.sse import EventStreamResponse
from service.api.visit import visit_of
from service.api.whole import whole_continuations

DESCRIPTION = """Continues a prompt.

With `stream: true` (the default) the answer is an event stream: `start`, `token` events, one
`done` for each continuation; or an `error` as the last event. The `text` of an index's `token`
events concatenates to exactly its `done.text`. Closing the connection cancels the request, unless
it was made with `detach_s`: then GET /generate/{id} goes on with it."""


def routes(context: ApiContext) -> APIRouter:
    """The route, on these parts."""
    router = APIRouter(tags=["generate"])

    @router.post(
        "/generate",
        summary="Continue a prompt",
        description=DESCRIPTION,
        **describe(
            GenerateRequest,
            GenerateAnswer,
            events=(StartEvent, TokenEvent, DoneEvent),
            refusals=(409,),
        ),
    )
    async def generate(request: Request) -> Response:
        visit = visit_of(request)
        with rejections_counted(context.metrics, visit.route):
            body = await read_json(request, GenerateRequest)
            plan = await make_plan(
                body,
                context,
                request_id_of(request),
                visit.began_s,
                owner=key_name_of(request),
            )
            tokenizer, _ = context.loaded()
            _check_id(plan.key, context, is_kept=body.detach_s > 0)
            if body.detach_s > 0:
                context.resumable.make_room()
            generation = context.generations.admit([plan], tokenizer, visit)
        # From here on the request is in flight: no await before somebody will call `abort`.
        if body.stream:
            writer = EventWriter(generation, tokenizer, context.model_name)
            if body.detach_s > 0:
                client = context.resumable.add(writer, body.detach_s).attach(after=-1)
                return EventStreamResponse(
                    client.next_chunk, client.close, context.limits.keep_alive_s
                )
            return EventStreamResponse(
                writer.next_chunk, generation.abort, context.limits.keep_alive_s
            )
        try:
            answer = await run_while_connected(
                _whole_answer(generation, tokenizer, context.model_name), request.receive
            )
        finally:
            generation.abort()
        return Response(answers.encode(answer), media_type="application/json")

    return router


def _check_id(key: RequestKey, context: ApiContext, *, is_kept: bool) -> None:
    """The id of a request that can be resumed must mean one request. Raises `ProblemError`."""
    if context.resumable.find(key) is None and not (is_kept and context.generations.is_active(key)):
        return
    raise ProblemError(
        "id-in-use",
        409,
        f"X-Request-Id: {key[1]!r} is the id of another request, and one of the two was made "
        "with detach_s; send another id, or none",
        field="X-Request-Id",
    )


async def _whole_answer(
    generation: Generation, tokenizer: Tokenizer, model_name: str
) -> GenerateAnswer:
    """Wait for all continuations. Raises `ProblemError` when one failed."""
    plan = generation.plan
    wholes = await whole_continuations(generation)
    usage, timing = combined(generation.continuations)
    return GenerateAnswer(
        id=plan.request_id,
        model=model_name,
        created=int(time.time()),
        seed=plan.seed,
        choices=[
            Choice(
                index=one.done.index,
                text=one.done.text,
                token_ids=one.token_ids,
                finish_reason=one.done.finish_reason,
                stop_reason=UNSET if one.done.stop_reason is None else one.done.stop_reason,
                logprobs=answers.logprobs(tokenizer, one.logprobs),
                explain=explanations(tokenizer, one.explained, plan.explain),
            )
            for one in wholes
        ],
        usage=usage,
        timing=timing,
    )
