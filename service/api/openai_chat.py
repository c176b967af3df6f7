"""POST /v1/chat/completions: answer a conversation, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from msgspec import UnsetType
from starlette.requests import Request
from starlette.responses import Response

from model.chat_template import ChatTemplateError
from model.tokenizer import Tokenizer
from service.api.admission import make_plan, rejections_counted, text_ids
from service.api.body import read_json
from service.api.context import ApiContext
from service.api.continuation import Delta, Done
from service.api.errors import (
    OpenAIErrorAnswer,
    ProblemError,
    invalid_field,
    request_id_of,
    retry_after,
)
from service.api.identity import key_name_of
from service.api.openai_answers import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatMessage,
    CompletionUsage,
    chat_logprobs,
    ending,
)
from service.api.openai_schemas import ChatRequest
from service.api.openai_stream import Header, check_model, make_header, renamed, respond
from service.api.openapi import describe
from service.api.visit import visit_of
from service.api.whole import Whole
from service.chat_renderer import ChatBusyError

RETRY_AFTER_BUSY_S = 5.0

DESCRIPTION = """Answers a conversation, as OpenAI's interface has it, with Vitrine's own sampling
fields beside OpenAI's. The checkpoint's chat template makes the prompt; a checkpoint without one
cannot chat, and is refused as such."""


def routes(context: ApiContext) -> APIRouter:
    """The route, on these parts."""
    router = APIRouter(tags=["openai"])

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation, in OpenAI's shapes",
        description=DESCRIPTION,
        **describe(
            ChatRequest,
            ChatCompletion,
            (ChatCompletionChunk,),
            refusals=(404,),
            refusal=OpenAIErrorAnswer,
        ),
    )
    async def chat_completions(request: Request) -> Response:
        visit = visit_of(request)
        with rejections_counted(context.metrics, visit.route):
            body = await read_json(request, ChatRequest)
            check_model(body.model, context)
            body.check()
            request_id = request_id_of(request)
            with renamed({"prompt": "messages", "max_tokens": body.max_tokens_field}):
                prompt_ids = await _prompt_ids(body, context)
                tokenizer, info = context.loaded()
                wish = body.to_generate(prompt_ids, info.context_length)
                plan = await make_plan(
                    wish, context, request_id, visit.began_s, owner=key_name_of(request)
                )
                header = make_header("chatcmpl", request_id, context)
                generation = context.generations.admit([plan], tokenizer, visit)
        # From here on the request is in flight: no await before somebody will call `abort`.
        return await respond(request, context, body, generation, ChatShape(header, tokenizer))

    return router


async def _prompt_ids(body: ChatRequest, context: ApiContext) -> list[int]:
    """The conversation as the template writes it, tokenized. The template has put every special
    token where it belongs, so that the tokenizer adds none."""
    tokenizer, info = context.loaded()
    renderer = context.chat_renderer()
    if renderer is None:
        raise ProblemError(
            "no-chat-template",
            422,
            f"{context.model_name} has no chat template, so that it cannot chat; /v1/completions "
            "continues a prompt, and --chat-template gives the server a template",
        )
    try:
        text = await renderer.render([message.for_template() for message in body.messages])
    except ChatTemplateError as error:
        raise invalid_field("messages", f"the chat template cannot be used: {error}") from error
    except ChatBusyError as error:
        headers = retry_after(RETRY_AFTER_BUSY_S)
        raise ProblemError("unavailable", 503, str(error), headers=headers) from error
    return await text_ids(text, tokenizer, info, context.limits, add_special_tokens=False)


class ChatShape:
    """The words of /v1/chat/completions."""

    def __init__(self, header: Header, tokenizer: Tokenizer) -> None:
        self._header = header
        self._tokenizer = tokenizer
        self._begun: set[int] = set()

    def chunks(
        self, item: Delta | Done, usage: CompletionUsage | UnsetType | None
    ) -> list[ChatCompletionChunk]:
        """See `Shape`. The first of an answer says whose it is."""
        choices = []
        if item.index not in self._begun:
            self._begun.add(item.index)
            choices.append(ChatChunkChoice(item.index, ChatDelta("assistant", "")))
        if isinstance(item, Done):
            end = ending(item)
            choices.append(
                ChatChunkChoice(
                    item.index,
                    ChatDelta(),
                    None,
                    end.finish_reason,
                    end.stop_reason,
                    end.cut_short_by,
                )
            )
        elif item.text or item.logprobs is not None:
            logprobs = chat_logprobs(self._tokenizer, item.logprobs)
            choices.append(ChatChunkChoice(item.index, ChatDelta(content=item.text), logprobs))
        return [self._chunk([choice], usage) for choice in choices]

    def last_chunk(self, usage: CompletionUsage) -> ChatCompletionChunk:
        """See `Shape`."""
        return self._chunk([], usage)

    def whole(self, wholes: Sequence[Whole], usage: CompletionUsage) -> ChatCompletion:
        """See `Shape`."""
        head = self._header
        return ChatCompletion(
            head.id,
            "chat.completion",
            head.created,
            head.model,
            head.system_fingerprint,
            [self._choice(one) for one in wholes],
            usage,
        )

    def _choice(self, one: Whole) -> ChatChoice:
        end = ending(one.done)
        return ChatChoice(
            one.done.index,
            ChatMessage(one.done.text),
            chat_logprobs(self._tokenizer, one.logprobs),
            end.finish_reason,
            end.stop_reason,
            end.cut_short_by,
        )

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: CompletionUsage | UnsetType | None
    ) -> ChatCompletionChunk:
        head = self._header
        return ChatCompletionChunk(
            head.id,
            "chat.completion.chunk",
            head.created,
            head.model,
            head.system_fingerprint,
            choices,
            usage,
        )
