"""Checks of what a client wants explained, against the model; raise `ProblemError`."""

from __future__ import annotations

from collections.abc import Sequence

from service.api.errors import ProblemError, invalid_field
from service.api.limits import ApiLimits
from service.api.schemas import GenerateRequest
from service.engine.messages import ModelInfo

OFF = "explanations are switched off on this server (--no-explain)"


def check_enabled(limits: ApiLimits) -> None:
    """403 on a server that explains nothing."""
    if not limits.max_explain_tokens:
        raise ProblemError("explain-off", 403, OFF)


def check_can_explain(info: ModelInfo) -> None:
    """403 on an engine whose model is cut over several processes."""
    if not info.can_explain:
        reason = f"a model that is cut into {info.tensor_parallel_size} parts explains nothing"
        raise ProblemError("explain-off", 403, reason)


def requested_heads(
    body: GenerateRequest, max_tokens: int, info: ModelInfo, limits: ApiLimits
) -> list[tuple[int, int]] | None:
    """The heads to tell of in a stream beside the mean of all; None when it does not explain."""
    if not body.explain:
        if body.explain_heads:
            raise invalid_field("explain_heads", f"{len(body.explain_heads)} without explain")
        return None
    if not limits.max_explain_tokens:
        raise invalid_field("explain", OFF)
    if not info.can_watch:
        raise invalid_field("explain", f"streams are not explained on {info.attention_backend}")
    num_tokens, limit = body.n * max_tokens, limits.max_explain_stream_tokens
    if num_tokens > limit:
        raise invalid_field(
            "explain",
            f"{body.n} continuations of {max_tokens} tokens are {num_tokens} tokens to explain; "
            f"the limit is {limit}",
        )
    return check_heads("explain_heads", body.explain_heads, info)


def check_heads(
    field: str, heads: Sequence[Sequence[int]], info: ModelInfo
) -> list[tuple[int, int]]:
    """[layer, head] pairs as the engine takes them."""
    for layer, head in heads:
        check_head(field, layer, head, info)
    pairs = [(layer, head) for layer, head in heads]
    if len(set(pairs)) < len(pairs):
        raise invalid_field(field, f"{len(pairs)} heads, {len(set(pairs))} of them different")
    return pairs


def check_head(field: str, layer: int, head: int, info: ModelInfo) -> None:
    """One of the model's heads."""
    check_below(field, layer, info.num_layers, "layers", of="layer ")
    check_below(field, head, info.num_heads, "heads", of="head ")


def check_below(field: str, value: int, count: int, what: str, *, of: str = "") -> None:
    """A number from 0 on; `of` says whose, where the field has more than one."""
    if value >= count:
        raise invalid_field(field, f"{of}{value}; there are {count} {what}, counted from 0")
