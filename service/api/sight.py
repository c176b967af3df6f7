"""What the tokens of a stream looked at, on its way from the engine's output to the client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import msgspec
from msgspec import UNSET, UnsetType

from model.tokenizer import Tokenizer
from service.api.answers import TokenExplanation, TopLogprob
from service.engine.explain_messages import AttendedByHead, AttendedPosition, Sight
from service.engine.messages import SequenceOutput

_decoder = msgspec.msgpack.Decoder(Sight)


def sights(output: SequenceOutput | None, num_tokens: int) -> list[msgspec.Raw]:
    """Of the first tokens of an output, encoded. Raises `ValueError` when there are not as many."""
    explained = (output.explained if output is not None else None) or []
    if len(explained) < num_tokens:
        raise ValueError(f"{num_tokens} tokens came with {len(explained)} explanations")
    return explained[:num_tokens]


def explanations(
    tokenizer: Tokenizer, seen: Sequence[msgspec.Raw] | None
) -> list[TokenExplanation] | UnsetType:
    """For the wire; UNSET when nothing was asked for."""
    if seen is None:
        return UNSET
    return [_explanation(tokenizer, _decoder.decode(one)) for one in seen]


def _explanation(tokenizer: Tokenizer, sight: Sight) -> TokenExplanation:
    # Lists that are JSON already, of these types; the encoder puts them in as they are.
    return TokenExplanation(
        attended=cast(list[AttendedPosition], msgspec.Raw(sight.attended)),
        heads=cast(list[AttendedByHead], msgspec.Raw(sight.heads)),
        top=[TopLogprob(one, tokenizer.token_text(one), value) for one, value in sight.top],
    )
