"""What the tokens of a stream looked at, on its way from the engine's output to the client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from model.tokenizer import Tokenizer
from service.api.answers import AttendedByHead, AttendedPosition, TokenExplanation, TopLogprob
from service.engine.explain_messages import Attended, Scored
from service.engine.messages import SequenceOutput

NUM_TOP = 5  # alternatives of each token

_decoder = msgspec.msgpack.Decoder(Attended)


@dataclass(frozen=True, slots=True)
class Sight:
    """What a client is told of one token. Kept encoded: many may wait for a slow reader."""

    attended: msgspec.Raw  # an `Attended`
    top: list[Scored]  # the likeliest tokens


def sights(output: SequenceOutput | None, num_tokens: int) -> list[Sight]:
    """Of the first tokens of an output. Raises `ValueError` when there are not as many."""
    if output is None or not num_tokens:
        return []
    explained, logprobs = output.explained or [], output.logprobs or []
    if min(len(explained), len(logprobs)) < num_tokens:
        raise ValueError(
            f"{num_tokens} tokens came with {len(explained)} explanations and {len(logprobs)} "
            "log-probabilities"
        )
    return [Sight(explained[place], logprobs[place].top[:NUM_TOP]) for place in range(num_tokens)]


def explanations(
    tokenizer: Tokenizer,
    seen: Sequence[Sight] | None,
    heads: Sequence[tuple[int, int]] | None,
) -> list[TokenExplanation] | UnsetType:
    """For the wire; `heads` are the (layer, head) that were asked for beside the mean. UNSET
    when nothing was asked for."""
    if seen is None:
        return UNSET
    return [_explanation(tokenizer, one, heads or ()) for one in seen]


def _explanation(
    tokenizer: Tokenizer, seen: Sight, heads: Sequence[tuple[int, int]]
) -> TokenExplanation:
    attended = _decoder.decode(seen.attended)
    return TokenExplanation(
        attended=_positions(attended.mean),
        heads=[
            AttendedByHead(layer, head, _positions(found))
            for (layer, head), found in zip(heads, attended.heads, strict=True)
        ],
        top=[TopLogprob(one, tokenizer.token_text(one), value) for one, value in seen.top],
    )


def _positions(found: list[Scored]) -> list[AttendedPosition]:
    return [AttendedPosition(position, weight) for position, weight in found]
