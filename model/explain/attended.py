"""Where the queries looked that chose a step's tokens, for the few sequences that somebody
watches: what a stream can show token by token.

The forward keeps the watched queries (`Watch` in model/batch.py); after it, the weights are
computed once more over the pages. `attended_torch` is the plain way, and the twin of
model/kernels/attended.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from model.attention import SelfAttention
from model.backends.base import AttentionStep
from model.batch import ForwardBatch, Watch
from model.config import ModelConfig
from model.explain.recording import ExplainError
from model.kv_cache import KVCache
from model.positions import RotaryPositions

# (row in the watch, layer, head)
ChosenHead = tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Attended:
    """Attention weights of watched queries, 0 beyond a query's own context."""

    mean: Float[Tensor, "num_watched max_context"]  # over all layers and heads
    heads: Float[Tensor, "num_chosen max_context"]


@dataclass(frozen=True, slots=True)
class Glance:
    """A position and the share of attention that it got."""

    position: int
    weight: float


@dataclass(frozen=True, slots=True)
class Glances:
    """Where one query looked most, strongest first: over all layers and heads, and in each of
    the heads that were asked for. Fewer than asked for where the rest got nothing."""

    mean: list[Glance]
    heads: list[list[Glance]]


def glances(
    attended: Attended, heads: Sequence[Sequence[tuple[int, int]]], num: int
) -> list[Glances]:
    """The `num` strongest positions of every watched row; `heads` are those given to
    `chosen_heads`, row by row."""
    mean, chosen = _strongest(attended.mean, num), iter(_strongest(attended.heads, num))
    return [
        Glances(row, [next(chosen) for _ in of_row])
        for row, of_row in zip(mean, heads, strict=True)
    ]


def chosen_heads(
    config: ModelConfig, heads: Sequence[Sequence[tuple[int, int]]]
) -> list[ChosenHead]:
    """The (layer, head) pairs of each watched row as one list. Raises `ExplainError` for a
    head that the model does not have."""
    for of_row in heads:
        for layer, head in of_row:
            if not (0 <= layer < config.num_layers and 0 <= head < config.num_heads):
                raise ExplainError(
                    f"there is no head {head} in layer {layer}: the model has "
                    f"{config.num_layers} layers of {config.num_heads} heads"
                )
    return [(row, layer, head) for row, of_row in enumerate(heads) for layer, head in of_row]


def _strongest(weights: Float[Tensor, "rows max_context"], num: int) -> list[list[Glance]]:
    top = weights.topk(min(num, int(weights.shape[1])), dim=1)
    return [
        [Glance(p, w) for p, w in zip(positions, values, strict=True) if w > 0]
        for positions, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class KeepingQueries:
    """An attention step that puts the watched queries aside, whatever the backend."""

    attend: AttentionStep
    batch: ForwardBatch
    watch: Watch

    def __call__(
        self,
        attention: SelfAttention,
        qkv: Float[Tensor, "num_tokens qkv_size"],
        rotary: RotaryPositions | None,
    ) -> Float[Tensor, "num_tokens query_size"]:
        rows = [self.batch.query_start_host[seq + 1] - 1 for seq in self.watch.seqs]
        if rotary is not None:
            positions = rotary.positions[rows]
            rotary_rows = RotaryPositions(rotary.cos_table, rotary.sin_table, positions)
        else:
            rotary_rows = None
        queries, _, _ = attention.heads(qkv[rows], rotary_rows)
        self.watch.queries[:, attention.layer] = queries.float() * attention.head_dim**-0.5
        return self.attend(attention, qkv, rotary)


def attended_torch(
    config: ModelConfig,
    cache: KVCache,
    batch: ForwardBatch,
    watch: Watch,
    chosen: Sequence[ChosenHead],
) -> Attended:
    """The weights, layer by layer and sequence by sequence, from the keys in the cache."""
    contexts = [batch.context_lens_host[seq] for seq in watch.seqs]
    mean = watch.queries.new_zeros(len(contexts), max(contexts))
    heads = watch.queries.new_zeros(len(chosen), max(contexts))
    for row, (seq, context) in enumerate(zip(watch.seqs, contexts, strict=True)):
        table = batch.block_tables[seq, : -(-context // cache.block_size)]
        for layer in range(config.num_layers):
            # (blocks, kv_heads, d, block_size) -> (kv_heads, d, keys)
            pages = cache.keys[layer][table].permute(1, 2, 0, 3).flatten(2)
            keys = pages[:, :, :context].float()
            queries = watch.queries[row, layer].unflatten(0, (config.num_kv_heads, -1))
            scores = (queries @ keys).flatten(0, 1)
            window = config.window(layer)
            if window is not None:
                scores[:, : max(context - window, 0)] = -torch.inf
            weights = torch.softmax(scores, dim=-1)
            mean[row, :context] += weights.sum(dim=0)
            for i, (of_row, of_layer, head) in enumerate(chosen):
                if (of_row, of_layer) == (row, layer):
                    heads[i, :context] = weights[head]
    return Attended(mean / (config.num_layers * config.num_heads), heads)
