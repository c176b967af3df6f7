"""What the server sends: the bodies of events and of JSON answers, as msgspec structs.

msgspec, because an event per token is encoded from them, and one definition serves the wire
and the documentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from model.tokenizer import Tokenizer
from service.engine.explain_messages import AttendedByHead, AttendedPosition
from service.engine.messages import TokenLogprob

_encoder = msgspec.json.Encoder()


def encode(body: msgspec.Struct) -> bytes:
    """JSON, in one line."""
    return _encoder.encode(body)


class TopLogprob(msgspec.Struct, frozen=True, gc=False):
    """One of the likeliest tokens at a position."""

    token_id: int
    text: str
    logprob: float


class Logprob(msgspec.Struct, frozen=True):
    """A token's log-probability under the model itself, before temperature and truncation."""

    token_id: int
    text: str
    logprob: float
    rank: Annotated[int, Meta(description="1 is the likeliest.")]
    top: list[TopLogprob]


class Usage(msgspec.Struct, frozen=True):
    """Tokens that a request took."""

    prompt_tokens: int
    cached_prompt_tokens: Annotated[
        int, Meta(description="Of the prompt's: those found in the KV cache.")
    ]
    completion_tokens: int


class Timing(msgspec.Struct, frozen=True):
    """Where the time went, in seconds."""

    queue_s: Annotated[
        float,
        Meta(
            description="From arrival at the engine to its first step; all the time where there "
            "was no token."
        ),
    ]
    prefill_s: Annotated[float, Meta(description="From there to the first token.")]
    time_to_first_token_s: Annotated[
        float | None, Meta(description="From the request's arrival; null if there was no token.")
    ]
    decode_s: Annotated[float, Meta(description="From the first token to the last.")]
    tokens_per_s: Annotated[
        float, Meta(description="Tokens over the time from leaving the queue to the last token.")
    ]


class TokenExplanation(msgspec.Struct, frozen=True):
    """What the query that chose a token looked at, and what else it may have chosen."""

    attended: Annotated[
        list[AttendedPosition],
        Meta(description="At most 8, heaviest first: the mean over all layers and heads."),
    ]
    heads: Annotated[list[AttendedByHead], Meta(description="As in `explain_heads`.")]
    top: Annotated[list[TopLogprob], Meta(description="The five likeliest, before sampling.")]


class StartEvent(msgspec.Struct, frozen=True):
    """The first event: the request is admitted."""

    id: str
    model: str
    created: Annotated[int, Meta(description="Unix time in seconds.")]
    prompt_tokens: int
    seed: Annotated[int, Meta(description="Sent again, it gives the same tokens.")]


class TokenEvent(msgspec.Struct, frozen=True):
    """New tokens of one continuation; several when the client is slower than the model."""

    index: int
    text: Annotated[
        str, Meta(description="Complete characters; held back while a stop string may begin.")
    ]
    token_ids: list[int]
    logprobs: list[Logprob] | UnsetType = UNSET
    explain: Annotated[
        list[TokenExplanation] | UnsetType, Meta(description="Parallel to token_ids.")
    ] = UNSET


class DoneEvent(msgspec.Struct, frozen=True):
    """The end of one continuation."""

    index: int
    finish_reason: Annotated[str, Meta(description="stop, length, timeout, cancelled or error.")]
    text: str
    usage: Usage
    timing: Timing
    stop_reason: str | int | UnsetType = UNSET


class Choice(msgspec.Struct, frozen=True):
    """One continuation of an answer that is not streamed."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | UnsetType = UNSET
    logprobs: list[Logprob] | UnsetType = UNSET
    explain: Annotated[
        list[TokenExplanation] | UnsetType, Meta(description="Parallel to token_ids.")
    ] = UNSET


class GenerateAnswer(msgspec.Struct, frozen=True):
    """The answer of /generate with `stream: false`."""

    id: str
    model: str
    created: int
    seed: int
    choices: list[Choice]
    usage: Usage
    timing: Timing


class CancelAnswer(msgspec.Struct, frozen=True):
    """The answer of /generate/{id}/cancel."""

    id: str
    status: Annotated[
        Literal["cancelled", "ended"],
        Meta(description="ended: it had, by itself, before it could be cancelled."),
    ]


class TokenSpan(msgspec.Struct, frozen=True):
    """A token and the characters of the text that it stands for."""

    id: int
    text: str
    start: int
    end: int


class TokenizeAnswer(msgspec.Struct, frozen=True):
    """The answer of /tokenize."""

    token_ids: list[int]
    tokens: list[TokenSpan]
    count: int


class DetokenizeAnswer(msgspec.Struct, frozen=True):
    """The answer of /detokenize."""

    text: str


class HealthAnswer(msgspec.Struct, frozen=True):
    """The answer of /health/*."""

    status: str


class KvCacheInfo(msgspec.Struct, frozen=True):
    """Room for keys and values."""

    tokens: int
    bytes: int
    blocks: int
    block_size: int


class InfoAnswer(msgspec.Struct, frozen=True):
    """The answer of /info."""

    model: str
    family: str
    parameters: int
    dtype: str
    device: str
    context_length: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    eos_token_ids: list[int]
    kv_cache: KvCacheInfo
    weight_bytes: int
    load_s: float
    threads: int
    deterministic: bool
    attention_backend: str
    tensor_parallel_size: int
    engine: Annotated[str, Meta(description="The engine's state.")]
    versions: dict[str, str]
    limits: dict[str, int | float]


def logprobs(
    tokenizer: Tokenizer, found: Sequence[TokenLogprob] | None
) -> list[Logprob] | UnsetType:
    """The engine's log-probabilities with the tokens' texts; UNSET when none were asked for."""
    if found is None:
        return UNSET
    text = tokenizer.token_text
    return [
        Logprob(
            token_id=one.token_id,
            text=text(one.token_id),
            logprob=one.logprob,
            rank=one.rank,
            top=[TopLogprob(other, text(other), value) for other, value in one.top],
        )
        for one in found
    ]
