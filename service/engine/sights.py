"""What the tokens of a step looked at, for the sequences whose clients asked.

The forward adds their weights up on its way; steps without such sequences do nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from model.batch import ForwardBatch
from model.config import ModelConfig
from model.explain.attended import Glance, Glances, glances, watch
from service.engine.explain_messages import AttendedByHead, AttendedPosition, Scored, Sight
from service.engine.scheduler import Scheduled

NUM_POSITIONS = 8  # told of each token, and of each head of it
NUM_TOP = 5  # alternatives told of each token
DECIMALS = 6
_UNIT = 10**DECIMALS

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
    return replace(batch, watch=watch(config, heads, longest_context, block_size, device))


def seen(
    batch: ForwardBatch,
    step: list[Scheduled],
    config: ModelConfig,
    logits: Float[Tensor, "num_logits vocab_size"],
) -> Sights:
    """What the watched sequences of a batch looked at, and what their next tokens may have been;
    after its forward, which gave these logits."""
    if batch.watch is None:
        return NOTHING_SEEN
    places = batch.watch.seqs
    ids_of, logprobs_of = _alternatives(logits, _logits_rows(step, places))
    return {
        step[place].sequence.id: _sight(glance, step[place].sequence.explain or (), ids, logprobs)
        for place, glance, ids, logprobs in zip(
            places,
            glances(config, batch.watch, NUM_POSITIONS),
            ids_of,
            logprobs_of,
            strict=True,
        )
    }


def _alternatives(
    logits: Float[Tensor, "num_logits vocab_size"], rows: list[int]
) -> tuple[list[list[int]], list[list[float]]]:
    """The likeliest tokens of these rows, and their log-probabilities. NumPy, because of a few
    thousand numbers torch makes work for all threads, and on a busy machine waits for the last."""
    chosen = logits.cpu().numpy()[rows]
    top = torch.from_numpy(chosen).topk(min(NUM_TOP, chosen.shape[1]))
    peaks = chosen.max(axis=1, keepdims=True)
    masses = np.log(np.exp(chosen - peaks).sum(axis=1, keepdims=True)) + peaks
    return top.indices.tolist(), (top.values.numpy() - masses).tolist()


def _logits_rows(step: list[Scheduled], places: Sequence[int]) -> list[int]:
    """Those of the items of a step at these places; items that draw nothing have none."""
    row_of: dict[int, int] = {}
    for place, item in enumerate(step):
        if item.samples:
            row_of[place] = len(row_of)
    return [row_of[place] for place in places]


def _sight(
    glance: Glances, heads: Sequence[tuple[int, int]], ids: list[int], logprobs: list[float]
) -> msgspec.Raw:
    by_head = [
        AttendedByHead(layer, head, _positions(one))
        for (layer, head), one in zip(heads, glance.heads, strict=True)
    ]
    top: list[Scored] = list(zip(ids, logprobs, strict=True))
    sight = Sight(_json.encode(_positions(glance.mean)), _json.encode(by_head), top)
    return msgspec.Raw(_msgpack.encode(sight))


def _positions(glance: Glance) -> list[AttendedPosition]:
    # `round` takes three times as long, and weights are no negative numbers.
    return [
        AttendedPosition(position, int(weight * _UNIT + 0.5) / _UNIT)
        for position, weight in zip(glance.positions, glance.weights, strict=True)
    ]
