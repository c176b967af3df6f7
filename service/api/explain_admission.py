"""From a well-formed request for an explanation to what the engine is asked: tokenize, and check
what depends on the model and on the text."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from model.tokenizer import IncrementalDecoder, Tokenizer
from service.api.admission import check_token_ids
from service.api.context import ApiContext
from service.api.errors import ProblemError, invalid_field
from service.api.explain_checks import check_below, check_head, check_heads
from service.api.explain_schemas import ExplainRequest
from service.api.limits import ApiLimits
from service.engine.explain_messages import AblationWish, ExplainWish
from service.engine.messages import ModelInfo

Span = tuple[int, int]  # characters of a text: from, to before


@dataclass(frozen=True, slots=True)
class ShownText:
    """What is explained."""

    text: str
    token_ids: list[int]
    spans: list[Span]  # of each token


async def shown_text(body: ExplainRequest, context: ApiContext, owner: str | None) -> ShownText:
    """The text that is meant. Raises `ProblemError`: 422, or 404 for a request that is not kept
    for this key."""
    tokenizer, info = context.loaded()
    limit = context.limits.max_explain_tokens
    if (body.prompt is None) == (body.request is None):
        sent = "both were sent" if body.prompt is not None else "neither was sent"
        raise invalid_field("prompt", f"exactly one of prompt and request is needed; {sent}")
    if isinstance(body.prompt, str):
        return await _from_text(body.prompt, tokenizer, context.limits)
    if body.prompt is not None:
        _check_length("prompt", len(body.prompt), limit)
        check_token_ids("prompt", body.prompt, info.vocab_size)
        return _from_ids(body.prompt, tokenizer)
    return _from_ids(_recent_ids(body, context, owner), tokenizer)


def check_wish(
    body: ExplainRequest, num_tokens: int, info: ModelInfo, limits: ApiLimits
) -> ExplainWish:
    """What to ask of the engine. Raises `ProblemError` (422) naming field, value and limit."""
    layers = _chosen("layers", body.layers, info.num_layers)
    heads = _chosen("heads", body.heads, info.num_heads)
    positions = [num_tokens - 1]
    if body.lens_positions is not None:
        positions = _chosen("lens_positions", body.lens_positions, num_tokens)
    if num_tokens + body.max_tokens > info.context_length:
        raise invalid_field(
            "max_tokens",
            f"{num_tokens} tokens and {body.max_tokens} to go on with exceed the context length "
            f"of {info.context_length}",
        )
    _check_sizes(body, num_tokens, (len(layers), len(heads), len(positions)), info, limits)
    head = None
    if body.head is not None:
        check_head("head", body.head.layer, body.head.head, info)
        check_below("head", body.head.query, num_tokens, "tokens", of="query ")
        head = (body.head.layer, body.head.head, body.head.query)
    return ExplainWish(
        layers=layers,
        heads=heads,
        attention=body.attention,
        top_k=body.top_k,
        lens=body.lens,
        lens_positions=positions,
        candidates=body.candidates,
        head=head,
        ablate=_ablation(body, num_tokens, info),
        max_tokens=body.max_tokens,
    )


async def _from_text(text: str, tokenizer: Tokenizer, limits: ApiLimits) -> ShownText:
    limit = limits.max_explain_tokens
    at_least = tokenizer.fewest_tokens(text)
    if at_least > limit:
        raise invalid_field(
            "prompt",
            f"{len(text)} characters are at least {at_least} tokens; an explanation takes "
            f"{limit} at most",
        )
    if len(text) <= limits.tokenize_in_thread_chars:
        ids, spans = tokenizer.encode_with_offsets(text)
    else:
        ids, spans = await asyncio.to_thread(tokenizer.encode_with_offsets, text)
    if not ids:
        raise invalid_field("prompt", "the text has no tokens")
    _check_length("prompt", len(ids), limit)
    return ShownText(text, ids, spans)


def _from_ids(ids: list[int], tokenizer: Tokenizer) -> ShownText:
    text, spans = spans_of(ids, tokenizer)
    return ShownText(text, ids, spans)


def spans_of(ids: list[int], tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    """The text of these ids, special tokens shown, and each one's characters in it. Tokens that
    hold parts of one character all have it, as in /tokenize."""
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=False)
    text = ""
    spans: list[Span] = []
    for token_id in ids:
        start = len(text)
        text += decoder.push((token_id,))
        spans.append((start, len(text) + decoder.is_within_character))
    text += decoder.flush()
    return text, [(start, min(end, len(text))) for start, end in spans]


def _recent_ids(body: ExplainRequest, context: ApiContext, owner: str | None) -> list[int]:
    logs = context.recent.find((owner, body.request or ""))
    if logs is None:
        raise ProblemError(
            "not-found",
            404,
            "request: no request with this id is kept; the last ones of each API key are, for "
            "that key",
            field="request",
        )
    check_below("index", body.index, len(logs), "continuations")
    log = logs[body.index]
    limit = context.limits.max_explain_tokens
    ids = log.token_ids
    if ids is None:
        raise invalid_field("request", _too_long(log.num_tokens, limit))
    return ids


def _check_length(field: str, num_tokens: int, limit: int) -> None:
    if num_tokens > limit:
        raise invalid_field(field, _too_long(num_tokens, limit))


def _too_long(num_tokens: int, limit: int) -> str:
    return f"{num_tokens} tokens; an explanation takes {limit} at most"


def _chosen(field: str, wanted: list[int] | None, count: int) -> list[int]:
    """Those that were asked for, or all."""
    if wanted is None:
        return list(range(count))
    what = "tokens" if field == "lens_positions" else field
    for one in wanted:
        check_below(field, one, count, what)
    if len(set(wanted)) < len(wanted):
        raise invalid_field(field, f"{len(wanted)} were sent, {len(set(wanted))} of them different")
    return wanted


def _check_sizes(
    body: ExplainRequest,
    num_tokens: int,
    chosen: tuple[int, int, int],
    info: ModelInfo,
    limits: ApiLimits,
) -> None:
    """`chosen`: numbers of layers, heads and lens positions."""
    layers, heads, positions = chosen
    recorded = layers * info.num_heads * num_tokens**2
    if recorded > limits.max_explain_recorded:
        raise invalid_field(
            "layers",
            f"{layers} layers x {info.num_heads} heads x {num_tokens} x {num_tokens} tokens are "
            f"{recorded} weights to compute; the limit is {limits.max_explain_recorded}",
        )
    per_query = {"full": num_tokens, "mean": num_tokens, "top": body.top_k, "none": 0}
    maps = 1 if body.attention == "mean" else layers * heads
    count = maps * num_tokens * per_query[body.attention]
    if count > limits.max_explain_weights:
        raise invalid_field(
            "attention",
            f"{body.attention} of {layers} layers, {heads} heads and {num_tokens} tokens has "
            f"{count} weights; the limit is {limits.max_explain_weights}",
        )
    count = (info.num_layers + 1) * positions * body.lens
    if count > limits.max_explain_lens:
        raise invalid_field(
            "lens",
            f"{info.num_layers + 1} residuals x {positions} positions x {body.lens} candidates "
            f"are {count}; the limit is {limits.max_explain_lens}",
        )


def _ablation(body: ExplainRequest, num_tokens: int, info: ModelInfo) -> AblationWish | None:
    if body.ablate is None:
        return None
    if not body.ablate.heads and not body.ablate.edges:
        raise invalid_field("ablate", "neither heads nor edges: there is nothing to switch off")
    for query, key in body.ablate.edges:
        check_below("ablate", query, num_tokens, "tokens", of="edge from query ")
        if key > query:
            raise invalid_field(
                "ablate",
                f"edge from query {query} to key {key}: a token sees itself and those before it",
            )
    return AblationWish(
        heads=check_heads("ablate", body.ablate.heads, info),
        edges=[(query, key) for query, key in body.ablate.edges],
    )
