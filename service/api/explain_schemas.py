"""What a client may send to POST /explain. Bounds that depend on the model and on the text are
checked in explain_admission.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.api.request_body import RequestBody
from service.api.schemas import Index, Pair, Prompt


class HeadQuery(RequestBody):
    """One head of one layer, and the position of the token that asks."""

    layer: Index
    head: Index
    query: Index


class Ablate(RequestBody):
    """What a second run does without."""

    heads: list[Pair] = Field(
        [],
        max_length=64,
        fail_fast=True,
        description="[layer, head] pairs: the head's output is zero.",
    )
    edges: list[Pair] = Field(
        [],
        max_length=256,
        fail_fast=True,
        description="[query, key] pairs of positions: that query does not see that key, in any "
        "layer and head; its other keys share the weight.",
    )


class ExplainRequest(RequestBody):
    """See what the model does with a text."""

    prompt: Prompt | None = Field(
        None, description="A text, or token ids. Exactly one of prompt and request."
    )
    request: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="The id (`X-Request-Id`) of a recent request of this API key, running or "
        "ended: its prompt and what it has generated.",
    )
    index: int = Field(
        0, ge=0, le=2**31 - 1, description="Which continuation of `request`, where there are more."
    )
    layers: list[Index] | None = Field(
        None,
        min_length=1,
        fail_fast=True,
        description="Layers whose attention is told, from 0; null: all.",
    )
    heads: list[Index] | None = Field(
        None, min_length=1, fail_fast=True, description="Query heads of these layers; null: all."
    )
    attention: Literal["top", "full", "mean", "none"] = Field(
        "top",
        description="top: the heaviest keys of each query; full: all weights; mean: those, over "
        "the chosen layers and heads.",
    )
    top_k: int = Field(8, ge=1, le=32, description="Keys of each query, for attention top.")
    lens: int = Field(
        5, ge=0, le=20, description="Candidates of each layer and position; 0: no lens."
    )
    lens_positions: list[Index] | None = Field(
        None, min_length=1, fail_fast=True, description="Null: the last position only."
    )
    candidates: int = Field(10, ge=1, le=20, description="Of the next token.")
    head: HeadQuery | None = Field(None, description="Show the steps of one head in numbers.")
    ablate: Ablate | None = Field(
        None, description="Switch heads or edges off, and tell what that does to the next token."
    )
    max_tokens: int = Field(
        0,
        ge=0,
        le=32,
        description="Tokens of a greedy continuation, and of one without what is ablated.",
    )
