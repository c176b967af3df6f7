"""What the tokens of a step looked at, for the sequences whose clients asked.

The forward adds their weights up on its way; steps without such sequences do nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from model.batch import ForwardBatch
from model.config import ModelConfig
from model.explain.attended import watch
from service.engine.explain_messages import NUM_POSITIONS, NUM_TOP, Sight
from service.engine.scheduler import Scheduled

DECIMALS = 6  # float32 has no more

Sights = Mapping[int, Sight]  # by the sequence's id
NOTHING_SEEN: Sights = {}


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
    watch = batch.watch
    if watch is None:
        return NOTHING_SEEN
    places, tokens = watch.places.cpu().numpy(), watch.tokens.cpu().numpy()
    weights = watch.weights.double().cpu().numpy().round(DECIMALS)
    logprobs = watch.logprobs.double().cpu().numpy().round(DECIMALS)
    sights = {}
    begin = 0
    for row, place in enumerate(watch.seqs):
        sequence = step[place].sequence
        end = begin + 1 + len(sequence.explain or ())
        sights[sequence.id] = Sight(
            places[begin:end].tobytes(),
            weights[begin:end].tobytes(),
            tokens[row].tobytes(),
            logprobs[row].tobytes(),
        )
        begin = end
    return sights
