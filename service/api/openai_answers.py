"""What OpenAI's routes send: the shapes of its answers and chunks, as msgspec structs.

`finish_reason` is `stop` or `length`, as OpenAI's clients know them. An answer that ended at its
time limit or by the server's shutdown was cut short too: it says `length`, and `cut_short_by`,
which only then is there, says by what.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from model.tokenizer import Tokenizer
from service.api.continuation import Continuation, Done, combined
from service.engine.messages import ModelInfo, TokenLogprob

FinishReason = Annotated[str, Meta(description="stop or length.")]
StopReason = Annotated[str | int, Meta(description="The stop string or stop token id that hit.")]
CutShortBy = Annotated[str, Meta(description="timeout or cancelled, where finish_reason is length")]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens: those found in the KV cache."""

    cached_tokens: int


class CompletionUsage(msgspec.Struct, frozen=True):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: Annotated[list[int], Meta(description="Where in `text` each token begins.")]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One continuation, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: StopReason | UnsetType = UNSET
    cut_short_by: CutShortBy | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True):
    """The answer of /v1/completions, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | UnsetType | None = UNSET


class ChatTopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    """A token's log-probability under the model itself, before temperature and truncation."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Of the tokens of a message."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """What the model answers."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatDelta(msgspec.Struct, frozen=True):
    """A piece of a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason | UnsetType = UNSET
    cut_short_by: CutShortBy | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: StopReason | UnsetType = UNSET
    cut_short_by: CutShortBy | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """Each chunk of a stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct, frozen=True):
    """A model that can be asked for."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "vitrine"


class ModelList(msgspec.Struct, frozen=True):
    """The answer of /v1/models."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Ending(msgspec.Struct, frozen=True):
    """How a choice says why it ended."""

    finish_reason: str
    stop_reason: str | int | UnsetType
    cut_short_by: str | UnsetType


def ending(done: Done) -> Ending:
    """Our reason to end in OpenAI's words."""
    is_cut = done.finish_reason not in ("stop", "length")
    return Ending(
        finish_reason="length" if is_cut else done.finish_reason,
        stop_reason=UNSET if done.stop_reason is None else done.stop_reason,
        cut_short_by=done.finish_reason if is_cut else UNSET,
    )


def fingerprint(model_name: str, info: ModelInfo) -> str:
    """Stands for all that the same seed needs to give the same tokens, besides the request."""
    parts = (
        model_name,
        info.num_parameters,
        info.dtype,
        info.device,
        info.deterministic,
        info.attention_backend,
        info.threads,
        info.torch_version,
    )
    return f"fp_{sha256(repr(parts).encode()).hexdigest()[:12]}"


def usage(continuations: Sequence[Continuation], per_prompt: int) -> CompletionUsage:
    """Tokens of a whole request, of which each prompt has `per_prompt` continuations."""
    prompt_tokens = cached = completion_tokens = 0
    for start in range(0, len(continuations), per_prompt):
        one, _ = combined(continuations[start : start + per_prompt])
        prompt_tokens += one.prompt_tokens
        cached += one.cached_prompt_tokens
        completion_tokens += one.completion_tokens
    return CompletionUsage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptTokensDetails(cached),
    )


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as OpenAI writes it: its text, or `bytes:` and its bytes when those are no text,
    so that two tokens with parts of characters do not look the same."""
    data = tokenizer.token_bytes(token_id) or b""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(
    tokenizer: Tokenizer, found: Sequence[TokenLogprob] | None
) -> ChatLogprobs | None:
    """Log-probabilities in the shape of chats; None when none were asked for."""
    if found is None:
        return None
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                token_name(tokenizer, one.token_id),
                one.logprob,
                _bytes(tokenizer, one.token_id),
                [
                    ChatTopLogprob(token_name(tokenizer, other), value, _bytes(tokenizer, other))
                    for other, value in one.top
                ],
            )
            for one in found
        ]
    )


def _bytes(tokenizer: Tokenizer, token_id: int) -> list[int] | None:
    data = tokenizer.token_bytes(token_id)
    return None if data is None else list(data)
