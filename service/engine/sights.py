"""What the tokens of a step looked at, for the sequences whose clients asked.

The forward adds their weights up on its way; steps without such sequences do nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from model.batch import ForwardBatch, Watch
from model.config import ModelConfig
from model.explain.attended import watch
from service.engine.explain_messages import NUM_POSITIONS, NUM_TOP, Sight
from service.engine.scheduler import Scheduled

DECIMALS = 6  # float32 has no more

Sights = Mapping[int, Sight]  # by the sequence's id
NOTHING_SEEN: Sights = {}


class Watcher:
    """Watches steps, with the same tensors as long as the same are watched: making a dozen of them
    takes as long as the watching itself (loadtests/NOTES.md, 2026-11-28)."""

    def __init__(self, config: ModelConfig, block_size: int, device: torch.device) -> None:
        self._config, self._block_size, self._device = config, block_size, device
        self._heads: dict[int, list[tuple[int, int]]] = {}
        self._watch: Watch | None = None

    def watching(self, batch: ForwardBatch, step: list[Scheduled]) -> ForwardBatch:
        """The batch, with those of its sequences watched that want it and get a token. What is
        found is there until the next call."""
        heads = {
            place: item.sequence.explain
            for place, item in enumerate(step)
            if item.sequence.explain is not None and item.samples
        }
        if not heads:
            return batch
        longest = max(batch.context_lens_host[place] for place in heads)
        kept = self._watch
        if kept is not None and self._heads == heads and longest <= kept.sums.shape[2]:
            kept.sums.zero_()
            kept.chosen.zero_()
        else:
            kept = watch(
                self._config,
                heads,
                longest,
                self._block_size,
                self._device,
                num_places=NUM_POSITIONS,
                num_tokens=NUM_TOP,
            )
            self._heads, self._watch = heads, kept
        return replace(batch, watch=kept)


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
