"""What crosses the process boundary for explanations: those that POST /explain asks for, and
what each token of a stream looked at. Part of messages.py, which knows the whole vocabulary."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

AttentionKind = Literal["top", "full", "mean", "none"]
Scored = tuple[int, float]  # a token and its log-probability in nats


class AblationWish(msgspec.Struct, frozen=True):
    """What a second run does without."""

    heads: list[tuple[int, int]] = []  # (layer, head)
    edges: list[tuple[int, int]] = []  # (query, key), in every layer and head


class ExplainWish(msgspec.Struct, frozen=True):
    """What is to be shown of a sequence; checked where the request entered."""

    layers: list[int]
    heads: list[int]
    attention: AttentionKind
    top_k: int
    lens: int  # candidates; 0: no lens
    lens_positions: list[int]
    candidates: int
    head: tuple[int, int, int] | None = None  # layer, head, query
    ablate: AblationWish | None = None
    max_tokens: int = 0


class Explain(msgspec.Struct, frozen=True, tag=True):
    """Show what the model does with these tokens. One at a time: the engine has room for one."""

    id: int
    token_ids: list[int]
    wish: ExplainWish


class EndExplain(msgspec.Struct, frozen=True, tag=True):
    """Forget an explanation; nothing with its id is sent any more, and nothing is answered."""

    id: int


class LensRow(msgspec.Struct, frozen=True, array_like=True):
    """A layer's residual at a position, read as if it were the last layer's."""

    layer: int  # 0 is the embedding
    position: int
    candidates: list[Scored]


class ExplainPart(msgspec.Struct, frozen=True, tag=True):
    """Some of what may be long; the parts of an explanation concatenate to all of it.

    The attention is JSON already here: numbers by the million would hold up the streams of a
    process that turned them into text at one go, and the engine does it between steps."""

    id: int
    attention: bytes = b""
    lens: list[LensRow] = []


class HeadNumbers(msgspec.Struct, frozen=True):
    """The equation for one query of one head: q . k, scaled, softmax, weighted sum of values.
    Lists go over the keys 0 to query."""

    layer: int
    head: int
    kv_head: Annotated[int, Meta(description="Whose keys and values the head reads.")]
    query: int
    head_dim: int
    scale: Annotated[float, Meta(description="1 / sqrt(head_dim).")]
    q: list[float]
    keys: list[list[float]]
    values: list[list[float]]
    scores: Annotated[list[float], Meta(description="q . k.")]
    scaled: list[float]
    visible: Annotated[list[bool], Meta(description="False outside of a sliding window: weight 0.")]
    weights: list[float]
    output: list[float]


class AblatedRun(msgspec.Struct, frozen=True):
    """The run without what was switched off, beside the one with it."""

    next: list[Scored]
    kl: float  # nats
    changes: list[tuple[int, float, float]]  # token, its log-probability with and without
    continuation: list[int]


class Explained(msgspec.Struct, frozen=True, tag=True):
    """All of an explanation but its parts, which came before; the last word about it."""

    id: int
    compute_s: float = 0.0
    token_scores: list[tuple[float, int]] = []  # log-probability and rank, from token 1 on
    entropy: list[list[float]] = []  # [layer][head], nats
    next: list[Scored] = []
    head: HeadNumbers | None = None
    continuation: list[int] = []
    ablated: AblatedRun | None = None
    refusal: str | None = None  # why the request cannot be answered, in words for the client
    error: str | None = None  # what went wrong, in words for the operator


NUM_POSITIONS = 8  # told of each token of a stream, and of each head of it
NUM_TOP = 5  # alternatives told of each token


class AttendedPosition(msgspec.Struct, frozen=True, gc=False):
    """A token that was looked at, and how much."""

    position: Annotated[int, Meta(description="In prompt and output, from 0.")]
    weight: float


class AttendedByHead(msgspec.Struct, frozen=True):
    """What one head looked at, heaviest first."""

    layer: int
    head: int
    attended: list[AttendedPosition]


class Sight(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the query that chose a token of a stream looked at, and what else it may have chosen.

    Arrays as they lie in this machine's memory, int32 and float64: a token has a hundred numbers of
    it, and the engine has the least time for them. Largest first; -1 where there are no more."""

    places: (
        bytes  # `NUM_POSITIONS` of the mean of all layers and heads, then of each head asked for
    )
    weights: bytes  # parallel to `places`
    tokens: bytes  # the likeliest
    logprobs: bytes  # parallel to `tokens`, nats


def recorded_id(explanation_id: int) -> int:
    """What the flight recorder calls an explanation; sequences have the numbers above 0."""
    return -explanation_id
