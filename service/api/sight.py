"""What the tokens of a stream looked at, on its way from the engine's output to the client."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from model.tokenizer import Tokenizer
from service.api.answers import TokenExplanation, TopLogprob
from service.engine.explain_messages import (
    NUM_POSITIONS,
    AttendedByHead,
    AttendedPosition,
    Sight,
)
from service.engine.messages import SequenceOutput


def sights(output: SequenceOutput | None, num_tokens: int) -> list[Sight]:
    """Of the first tokens of an output. Raises `ValueError` when there are not as many."""
    explained = (output.explained if output is not None else None) or []
    if len(explained) < num_tokens:
        raise ValueError(f"{num_tokens} tokens came with {len(explained)} explanations")
    return explained[:num_tokens]


def explanations(
    tokenizer: Tokenizer,
    seen: Sequence[Sight] | None,
    heads: Sequence[tuple[int, int]] | None,
) -> list[TokenExplanation] | UnsetType:
    """For the wire; UNSET when nothing was asked for. `heads`: those that were asked for."""
    if seen is None:
        return UNSET
    return [_explanation(tokenizer, one, heads or ()) for one in seen]


def _explanation(
    tokenizer: Tokenizer, sight: Sight, heads: Sequence[tuple[int, int]]
) -> TokenExplanation:
    places, weights = array("i", sight.places), array("d", sight.weights)
    attended, *by_head = [
        _attended(places[start : start + NUM_POSITIONS], weights[start : start + NUM_POSITIONS])
        for start in range(0, len(places), NUM_POSITIONS)
    ]
    top = zip(array("i", sight.tokens), array("d", sight.logprobs), strict=True)
    return TokenExplanation(
        attended=attended,
        heads=[AttendedByHead(*head, of) for head, of in zip(heads, by_head, strict=True)],
        top=[TopLogprob(i, tokenizer.token_text(i), logprob) for i, logprob in top if i >= 0],
    )


def _attended(places: array[int], weights: array[float]) -> list[AttendedPosition]:
    num = len(places) - places.count(-1)  # they stand at the end
    return list(map(AttendedPosition, places[:num], weights))
