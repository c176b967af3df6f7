"""What POST /explain sends, as msgspec structs: one definition for the wire and the docs."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from service.engine.explain_messages import AttentionKind, HeadNumbers


class ExplainedToken(msgspec.Struct, frozen=True):
    """A token of the text that was explained."""

    token_id: int
    text: str
    start: Annotated[int, Meta(description="Its characters in `text`, from here")]
    end: Annotated[int, Meta(description="to before here.")]
    logprob: Annotated[float | None, Meta(description="Null for the first token.")]
    rank: Annotated[int | None, Meta(description="1: the model's own choice. Null for the first.")]


class Candidate(msgspec.Struct, frozen=True):
    """A token that may come next."""

    token_id: int
    text: str
    logprob: Annotated[float, Meta(description="Nats.")]


class TopKeys(msgspec.Struct, frozen=True):
    """What one query looked at most, heaviest first."""

    keys: list[int]
    weights: list[float]


class Attention(msgspec.Struct, frozen=True):
    """Attention weights; of `full`, `mean` and `top` the one that `kind` names. A query sees the
    keys up to its own position, so rows grow by one; the weights of a row sum to 1."""

    kind: AttentionKind
    layers: list[int]
    heads: list[int]
    full: Annotated[
        list[list[list[list[float]]]] | UnsetType,
        Meta(description="[layer][head][query][key], in the order of `layers` and `heads`."),
    ] = UNSET
    mean: Annotated[list[list[float]] | UnsetType, Meta(description="[query][key].")] = UNSET
    top: Annotated[
        list[list[list[TopKeys]]] | UnsetType, Meta(description="[layer][head][query].")
    ] = UNSET


class LensEntry(msgspec.Struct, frozen=True):
    """A layer's residual, read as if it were the last layer's (the logit lens)."""

    layer: Annotated[int, Meta(description="0: the embedding; L: what the last of L layers left.")]
    position: int
    candidates: list[Candidate]


class ShownContinuation(msgspec.Struct, frozen=True):
    """What the model would go on with, greedily."""

    text: str
    token_ids: list[int]


class ChangedToken(msgspec.Struct, frozen=True):
    """What the ablation did to a token's log-probability."""

    token_id: int
    text: str
    logprob: float
    logprob_ablated: float


class AblatedAnswer(msgspec.Struct, frozen=True):
    """The next token without what was switched off."""

    next: list[Candidate]
    kl: Annotated[
        float, Meta(description="KL(original || ablated) of the next token's distribution, nats.")
    ]
    changes: Annotated[
        list[ChangedToken],
        Meta(description="Of the likeliest tokens before and after, those that moved most."),
    ]
    continuation: ShownContinuation | UnsetType = UNSET


class ExplainTiming(msgspec.Struct, frozen=True):
    """Where the time went, in seconds."""

    queue_s: Annotated[float, Meta(description="Until the engine began with it.")]
    compute_s: Annotated[
        float, Meta(description="Of computing; streams that came between do not count.")
    ]


class ExplainAnswer(msgspec.Struct, frozen=True):
    """The answer of /explain."""

    id: str
    model: str
    text: str
    tokens: list[ExplainedToken]
    attention: Attention
    entropy: Annotated[
        list[list[float]],
        Meta(description="[layer][head], nats, mean over the queries; as in `attention`."),
    ]
    lens: list[LensEntry]
    next: list[Candidate]
    timing: ExplainTiming
    head: HeadNumbers | UnsetType = UNSET
    continuation: ShownContinuation | UnsetType = UNSET
    ablated: AblatedAnswer | UnsetType = UNSET
