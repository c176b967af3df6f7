"""The JSON of an explanation, in pieces: the attention comes as JSON from the engine, and the rest
is written a little at a time, so that the streams go on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec
from msgspec import UNSET, UnsetType

from model.tokenizer import Tokenizer
from service.api import answers
from service.api.explain_admission import ShownText
from service.api.explain_answers import (
    AblatedAnswer,
    Attention,
    Candidate,
    ChangedToken,
    ExplainAnswer,
    ExplainedToken,
    ExplainTiming,
    LensEntry,
    ShownContinuation,
)
from service.engine.explain_messages import (
    AblatedRun,
    AttentionKind,
    Explained,
    ExplainWish,
    LensRow,
    Scored,
)
from service.explanations import Explanation

_LENS_ROWS = 64  # written at one go


async def explanation_json(
    explanation: Explanation,
    answer: Explained,
    shown: ShownText,
    tokenizer: Tokenizer,
    request_id: str,
    model_name: str,
) -> list[bytes]:
    """`ExplainAnswer` in pieces that follow each other."""
    wish = explanation.wish
    frame = ExplainAnswer(
        id=request_id,
        model=model_name,
        text=shown.text,
        tokens=_tokens(shown, answer.token_scores, tokenizer),
        attention=_empty_attention(wish),
        entropy=answer.entropy,
        lens=[],
        next=_candidates(answer.next, tokenizer),
        timing=ExplainTiming(round(explanation.queue_s, 6), round(answer.compute_s, 6)),
        head=UNSET if answer.head is None else answer.head,
        continuation=_continuation(wish, answer.continuation, tokenizer),
        ablated=_ablated(wish, answer.ablated, tokenizer),
    )
    pieces = [answers.encode(frame)]
    if wish.attention != "none":
        pieces = _filled(pieces, wish.attention, explanation.attention)
    return _filled(pieces, "lens", [b"[", *await _lens(explanation.lens, tokenizer), b"]"])


def _filled(pieces: list[bytes], name: str, content: Iterable[bytes]) -> list[bytes]:
    """The empty list of this name, in the last piece, filled. No text can hold what is looked
    for: in JSON its quotes would have a backslash before them."""
    before, _, after = pieces[-1].partition(b'"%b":[]' % name.encode())
    return [*pieces[:-1], before + b'"%b":' % name.encode(), *content, after]


def _tokens(
    shown: ShownText, scores: list[tuple[float, int]], tokenizer: Tokenizer
) -> list[ExplainedToken]:
    first: tuple[None, None] = (None, None)
    return [
        ExplainedToken(token_id, tokenizer.token_text(token_id), start, end, *score)
        for token_id, (start, end), score in zip(
            shown.token_ids, shown.spans, [first, *scores], strict=True
        )
    ]


def _empty_attention(wish: ExplainWish) -> Attention:
    def when(kind: AttentionKind) -> list[object] | UnsetType:
        return [] if wish.attention == kind else UNSET

    return Attention(
        kind=wish.attention,
        layers=wish.layers,
        heads=wish.heads,
        full=when("full"),  # type: ignore[arg-type]
        mean=when("mean"),  # type: ignore[arg-type]
        top=when("top"),  # type: ignore[arg-type]
    )


async def _lens(rows: list[LensRow], tokenizer: Tokenizer) -> list[bytes]:
    """The entries, with commas, without the brackets around them."""
    pieces: list[bytes] = []
    for start in range(0, len(rows), _LENS_ROWS):
        entries = [
            LensEntry(row.layer, row.position, _candidates(row.candidates, tokenizer))
            for row in rows[start : start + _LENS_ROWS]
        ]
        comma = b"," if pieces else b""
        pieces.append(comma + msgspec.json.encode(entries)[1:-1])
        await asyncio.sleep(0)
    return pieces


def _candidates(scored: Iterable[Scored], tokenizer: Tokenizer) -> list[Candidate]:
    return [
        Candidate(token_id, tokenizer.token_text(token_id), logprob) for token_id, logprob in scored
    ]


def _continuation(
    wish: ExplainWish, token_ids: list[int], tokenizer: Tokenizer
) -> ShownContinuation | UnsetType:
    if not wish.max_tokens:
        return UNSET
    return ShownContinuation(tokenizer.decode(token_ids), token_ids)


def _ablated(
    wish: ExplainWish, run: AblatedRun | None, tokenizer: Tokenizer
) -> AblatedAnswer | UnsetType:
    if run is None:
        return UNSET
    return AblatedAnswer(
        next=_candidates(run.next, tokenizer),
        kl=run.kl,
        changes=[
            ChangedToken(token_id, tokenizer.token_text(token_id), before, after)
            for token_id, before, after in run.changes
        ],
        continuation=_continuation(wish, run.continuation, tokenizer),
    )
