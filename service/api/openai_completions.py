"""POST /v1/completions: continue prompts, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter
from msgspec import UnsetType
from starlette.requests import Request
from starlette.responses import Response

from model.tokenizer import IncrementalDecoder, Tokenizer
from service.api.admission import make_plan, rejections_counted
from service.api.body import read_json
from service.api.context import ApiContext
from service.api.continuation import Delta, Done
from service.api.errors import OpenAIErrorAnswer, request_id_of
from service.api.generation import Plan
from service.api.identity import key_name_of
from service.api.openai_answers import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionUsage,
    ending,
    token_name,
)
from service.api.openai_schemas import CompletionRequest
from service.api.openai_stream import Header, check_model, make_header, renamed, respond
from service.api.openapi import describe
from service.api.visit import visit_of
from service.api.whole import Whole
from service.engine.messages import TokenLogprob

DESCRIPTION = """Continues one or several prompts, as OpenAI's interface has it, with Vitrine's own
sampling fields beside OpenAI's. Choices are counted on through all prompts: with `n` continuations
each, those of prompt p are p*n to p*n + n - 1."""


def routes(context: ApiContext) -> APIRouter:
    """The route, on these parts."""
    router = APIRouter(tags=["openai"])

    @router.post(
        "/v1/completions",
        summary="Continue prompts, in OpenAI's shapes",
        description=DESCRIPTION,
        **describe(
            CompletionRequest, Completion, (Completion,), refusals=(404,), refusal=OpenAIErrorAnswer
        ),
    )
    async def completions(request: Request) -> Response:
        visit = visit_of(request)
        with rejections_counted(context.metrics, visit.route):
            body = await read_json(request, CompletionRequest)
            check_model(body.model, context)
            body.check()
            request_id = request_id_of(request)
            plans = await _plans(body, context, request, visit.began_s)
            tokenizer, _ = context.loaded()
            header = make_header("cmpl", request_id, context)
            generation = context.generations.admit(plans, tokenizer, visit)
        # From here on the request is in flight: no await before somebody will call `abort`.
        shape = CompletionShape(header, tokenizer, plans)
        return await respond(request, context, body, generation, shape)

    return router


async def _plans(
    body: CompletionRequest, context: ApiContext, request: Request, arrived_s: float
) -> list[Plan]:
    """One for each prompt, each as it would be alone."""
    plans = []
    prompts = body.prompts
    for place, prompt in enumerate(prompts):
        with renamed({"prompt": f"prompt[{place}]"} if len(prompts) > 1 else {}):
            wish = body.to_generate(prompt)
            plans.append(
                await make_plan(
                    wish, context, request_id_of(request), arrived_s, owner=key_name_of(request)
                )
            )
        await asyncio.sleep(0)  # many prompts do not hold up the streams
    return plans


class CompletionShape:
    """The words of /v1/completions."""

    def __init__(self, header: Header, tokenizer: Tokenizer, plans: Sequence[Plan]) -> None:
        self._header = header
        self._logprobs = [LogprobsWriter(tokenizer, plan) for plan in plans for _ in plan.samplings]

    def chunks(
        self, item: Delta | Done, usage: CompletionUsage | UnsetType | None
    ) -> list[Completion]:
        """See `Shape`."""
        if isinstance(item, Delta):
            logprobs = self._logprobs[item.index].write(item.logprobs)
            if not item.text and logprobs is None:
                return []
            return [self._answer([CompletionChoice(item.index, item.text, logprobs)], usage)]
        return [self._answer([_choice(item, "", None)], usage)]

    def last_chunk(self, usage: CompletionUsage) -> Completion:
        """See `Shape`."""
        return self._answer([], usage)

    def whole(self, wholes: Sequence[Whole], usage: CompletionUsage) -> Completion:
        """See `Shape`."""
        choices = [
            _choice(one.done, one.done.text, self._logprobs[one.done.index].write(one.logprobs))
            for one in wholes
        ]
        return self._answer(choices, usage)

    def _answer(
        self, choices: list[CompletionChoice], usage: CompletionUsage | UnsetType | None
    ) -> Completion:
        head = self._header
        return Completion(
            head.id,
            "text_completion",
            head.created,
            head.model,
            head.system_fingerprint,
            choices,
            usage,
        )


class LogprobsWriter:
    """Writes the log-probabilities of one continuation, and counts where its tokens begin."""

    def __init__(self, tokenizer: Tokenizer, plan: Plan) -> None:
        self._tokenizer = tokenizer
        self._plan = plan
        self._decoder: IncrementalDecoder | None = None
        self._offset = len(plan.prefix)

    def write(self, found: Sequence[TokenLogprob] | None) -> CompletionLogprobs | None:
        """Those of the tokens that come next; None when none were asked for."""
        if found is None:
            return None
        offsets = []
        for one in found:
            offsets.append(self._offset)
            self._offset += self._num_chars(one.token_id)
        tokenizer = self._tokenizer
        return CompletionLogprobs(
            tokens=[token_name(tokenizer, one.token_id) for one in found],
            token_logprobs=[one.logprob for one in found],
            top_logprobs=[
                # As with OpenAI, the token itself is among them, even if it is none of the top.
                {token_name(tokenizer, other): value for other, value in one.top}
                | {token_name(tokenizer, one.token_id): one.logprob}
                for one in found
            ],
            text_offset=offsets,
        )

    def _num_chars(self, token_id: int) -> int:
        """Characters that this token completes."""
        if self._decoder is None:
            self._decoder = IncrementalDecoder(self._tokenizer, self._plan.prompt_token_ids)
        return len(self._decoder.push((token_id,)))


def _choice(done: Done, text: str, logprobs: CompletionLogprobs | None) -> CompletionChoice:
    end = ending(done)
    return CompletionChoice(
        done.index, text, logprobs, end.finish_reason, end.stop_reason, end.cut_short_by
    )
