"""What the tokens of a step looked at, for the sequences whose clients asked.

The forward notes where they looked from (`Watch`); after it, one more call tells where they
looked. Steps without such sequences do neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import torch

from model.batch import ForwardBatch, Watch
from model.config import ModelConfig
from model.explain.attended import Glance, chosen_heads, glances
from model.forward import Forward
from service.engine.explain_messages import Attended, Scored
from service.engine.scheduler import Scheduled

NUM_POSITIONS = 8  # told of each token, and of each head of it
DECIMALS = 6

Sights = Mapping[int, msgspec.Raw]  # sequence id -> `Attended`, encoded
NOTHING_SEEN: Sights = {}

_encoder = msgspec.msgpack.Encoder()


def watching(
    batch: ForwardBatch, step: list[Scheduled], config: ModelConfig, device: torch.device
) -> ForwardBatch:
    """The batch, with those of its sequences watched that want it and get a token."""
    seqs = tuple(
        place
        for place, item in enumerate(step)
        if item.sequence.explain is not None and item.samples
    )
    return replace(batch, watch=Watch.over(seqs, config, device)) if seqs else batch


def look(
    forward: Forward, batch: ForwardBatch, step: list[Scheduled], config: ModelConfig
) -> Sights:
    """What was seen in the call of `forward` before this one."""
    if batch.watch is None:
        return NOTHING_SEEN
    watched = [step[place].sequence for place in batch.watch.seqs]
    heads = [sequence.explain or [] for sequence in watched]
    attended = forward.attended(batch, chosen_heads(config, heads))
    return {
        sequence.id: msgspec.Raw(
            _encoder.encode(Attended(_scored(seen.mean), [_scored(one) for one in seen.heads]))
        )
        for sequence, seen in zip(watched, glances(attended, heads, NUM_POSITIONS), strict=True)
    }


def _scored(found: list[Glance]) -> list[Scored]:
    return [(one.position, round(one.weight, DECIMALS)) for one in found]
