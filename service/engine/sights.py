"""What the tokens of a step looked at, for the sequences whose clients asked.

The forward adds their weights up on its way; steps without such sequences do nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import torch

from model.batch import ForwardBatch
from model.config import ModelConfig
from model.explain.attended import Glance, glances, watch
from service.engine.explain_messages import Attended, Scored
from service.engine.scheduler import Scheduled

NUM_POSITIONS = 8  # told of each token, and of each head of it
DECIMALS = 6

Sights = Mapping[int, msgspec.Raw]  # sequence id -> `Attended`, encoded
NOTHING_SEEN: Sights = {}

_encoder = msgspec.msgpack.Encoder()


def watching(
    batch: ForwardBatch,
    step: list[Scheduled],
    config: ModelConfig,
    block_size: int,
    device: torch.device,
) -> ForwardBatch:
    """The batch, with those of its sequences watched that want it and get a token."""
    heads = {
        place: item.sequence.explain
        for place, item in enumerate(step)
        if item.sequence.explain is not None and item.samples
    }
    if not heads:
        return batch
    longest_context = max(batch.context_lens_host[place] for place in heads)
    return replace(batch, watch=watch(config, heads, longest_context, block_size, device))


def seen(batch: ForwardBatch, step: list[Scheduled], config: ModelConfig) -> Sights:
    """What the watched sequences of a batch looked at, after its forward."""
    if batch.watch is None:
        return NOTHING_SEEN
    found = glances(config, batch.watch, NUM_POSITIONS)
    return {
        step[place].sequence.id: msgspec.Raw(
            _encoder.encode(Attended(_scored(one.mean), [_scored(head) for head in one.heads]))
        )
        for place, one in zip(batch.watch.seqs, found, strict=True)
    }


def _scored(glance: Glance) -> list[Scored]:
    rounded = [round(weight, DECIMALS) for weight in glance.weights]
    return list(zip(glance.positions, rounded, strict=True))
