"""Where the queries looked that chose a step's tokens, for the few sequences that somebody
watches: what a stream can show token by token.

    watching = watch(config, heads, ...)          before a step
    forward(batch with watch=watching)            adds weights up on its way, finds the largest

model/kernels/attention.c and glance.c do it in the compiled forward; their twins, which serve every
other backend, are `Watching` and `find`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from model.attention import SelfAttention
from model.backends.base import AttentionStep
from model.batch import ForwardBatch, Watch
from model.config import ModelConfig
from model.explain.recording import check_head
from model.kv_cache import KVCache
from model.positions import RotaryPositions


def watch(
    config: ModelConfig,
    heads: Mapping[int, Sequence[tuple[int, int]]],
    longest_context: int,
    block_size: int,
    device: torch.device | str = "cpu",
    *,
    num_places: int = 8,
    num_tokens: int = 5,
) -> Watch:
    """A watch over the sequences that are the keys of `heads`, by their numbers in the batch;
    the values are the (layer, head) pairs wanted of each. `longest_context`: the most keys that
    one of them sees in the step. It finds so many strongest positions and likeliest tokens. Raises
    `ExplainError` for a head that is not there."""
    chosen = [(row, *pair) for row, pairs in enumerate(heads.values()) for pair in pairs]
    for _, layer, head in chosen:
        check_head(config, layer, head)
    columns = -(-longest_context // block_size) * block_size
    return Watch(
        tuple(heads),
        tuple(chosen),
        torch.zeros(len(heads), config.num_kv_heads, columns, device=device),
        torch.zeros(len(chosen), columns, device=device),
        torch.empty(len(heads) + len(chosen), num_places, dtype=torch.int32, device=device),
        torch.empty(len(heads) + len(chosen), num_places, device=device),
        torch.empty(len(heads), num_tokens, dtype=torch.int32, device=device),
        torch.empty(len(heads), num_tokens, device=device),
    )


def mean_weights(config: ModelConfig, watch: Watch) -> Float[Tensor, "num_rows columns"]:
    """Each watched query's weights over all layers and heads, after the step; rows sum to 1."""
    return watch.sums.sum(dim=1) / (config.num_layers * config.num_heads)


def find(
    config: ModelConfig,
    batch: ForwardBatch,
    watch: Watch,
    logits: Float[Tensor, "num_logits vocab_size"],
) -> None:
    """Find the strongest positions and the likeliest tokens, after the step's logits."""
    means = mean_weights(config, watch)
    rows: list[Tensor] = []
    for row, mean in enumerate(means):
        rows += [mean, *(watch.chosen[i] for i, one in enumerate(watch.heads) if one[0] == row)]
    num = min(watch.places.shape[1], means.shape[1])
    watch.places.fill_(-1)
    watch.weights.fill_(0)
    weights, places = torch.stack(rows).topk(num, dim=1)
    watch.places[:, :num] = places.where(weights > 0, -1)
    watch.weights[:, :num] = weights
    watch.tokens.fill_(-1)
    num = min(watch.tokens.shape[1], logits.shape[1])
    of_token = {token: i for i, token in reversed(list(enumerate(batch.logits_rows.tolist())))}
    for row, seq in enumerate(watch.seqs):
        at = of_token.get(batch.query_start_host[seq + 1] - 1)
        if at is not None:
            top = torch.log_softmax(logits[at].float(), dim=-1).topk(num)
            watch.logprobs[row, :num], watch.tokens[row, :num] = top


@dataclass(frozen=True, slots=True)
class Watching:
    """An attention step, and after it the watched queries' weights over the keys in the cache,
    whatever the backend."""

    attend: AttentionStep
    cache: KVCache
    batch: ForwardBatch
    watch: Watch

    def __call__(
        self,
        attention: SelfAttention,
        qkv: Float[Tensor, "num_tokens qkv_size"],
        rotary: RotaryPositions | None,
    ) -> Float[Tensor, "num_tokens query_size"]:
        mixed = self.attend(attention, qkv, rotary)
        rows = [self.batch.query_start_host[seq + 1] - 1 for seq in self.watch.seqs]
        if rotary is not None:
            positions = rotary.positions[rows]
            rotary = RotaryPositions(rotary.cos_table, rotary.sin_table, positions)
        queries, _, _ = attention.heads(qkv[rows], rotary)
        for row in range(len(rows)):
            self._add(attention, row, queries[row].float())
        return mixed

    def _add(
        self, attention: SelfAttention, row: int, queries: Float[Tensor, "num_heads head_dim"]
    ) -> None:
        seq, layer, cache = self.watch.seqs[row], attention.layer, self.cache
        context = self.batch.context_lens_host[seq]
        table = self.batch.block_tables[seq, : -(-context // cache.block_size)]
        # (blocks, kv_heads, d, block_size) -> (kv_heads, d, keys)
        keys = cache.keys[layer][table].permute(1, 2, 0, 3).flatten(2)[:, :, :context].float()
        scores = queries.unflatten(0, (attention.num_kv_heads, -1)) @ keys
        scores *= attention.head_dim**-0.5
        if attention.window is not None:
            scores[:, :, : max(context - attention.window, 0)] = -torch.inf
        weights = torch.softmax(scores, dim=-1)
        self.watch.sums[row, :, :context] += weights.sum(dim=1)
        for i, (of_row, of_layer, head) in enumerate(self.watch.heads):
            if (of_row, of_layer) == (row, layer):
                self.watch.chosen[i, :context] = weights.flatten(0, 1)[head]
