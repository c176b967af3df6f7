"""What the tokens of a step looked at, for the sequences whose clients asked.

The forward adds their weights up on its way; steps without such sequences do nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec
import torch

from model.batch import ForwardBatch
from model.config import ModelConfig
from model.explain.attended import Glance, Glances, glances, watch
from service.engine.explain_messages import AttendedByHead, AttendedPosition, Sight
from service.engine.scheduler import Scheduled

NUM_POSITIONS = 8  # told of each token, and of each head of it
NUM_TOP = 5  # alternatives told of each token

Sights = Mapping[int, msgspec.Raw]  # sequence id -> `Sight`, encoded
NOTHING_SEEN: Sights = {}

_json = msgspec.json.Encoder()
_msgpack = msgspec.msgpack.Encoder()


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
    watching = watch(
        config,
        heads,
        longest_context,
        block_size,
        device,
        num_places=NUM_POSITIONS,
        num_tokens=NUM_TOP,
    )
    return replace(batch, watch=watching)


def seen(batch: ForwardBatch, step: list[Scheduled]) -> Sights:
    """What the watched sequences of a batch looked at, and what their next tokens may have been;
    after its forward."""
    if batch.watch is None:
        return NOTHING_SEEN
    watched = [step[place].sequence for place in batch.watch.seqs]
    return {
        sequence.id: _sight(found, sequence.explain or ())
        for sequence, found in zip(watched, glances(batch.watch), strict=True)
    }


def _sight(found: Glances, heads: Sequence[tuple[int, int]]) -> msgspec.Raw:
    by_head = [
        AttendedByHead(layer, head, _positions(one))
        for (layer, head), one in zip(heads, found.heads, strict=True)
    ]
    sight = Sight(_json.encode(_positions(found.mean)), _json.encode(by_head), found.next)
    return msgspec.Raw(_msgpack.encode(sight))


def _positions(glance: Glance) -> list[AttendedPosition]:
    return list(map(AttendedPosition, glance.positions, glance.weights))
