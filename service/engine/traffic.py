"""How many bytes a step must read and how many operations it must do, from the architecture.

Counted is what the equation asks for: each weight once a step, the keys and values that a
query sees, each token's products in every layer, two operations for a multiplication and its
addition. Activations, norms' arithmetic, the sampler and rows that pad a step are not. Decode
steps cannot do with less. Of a prompt the compiled forward leaves out what nobody reads, all
tokens but one behind the last layer's attention: of gpt2's shape 6 percent, by which its share of
the roof is too high there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.kv_cache import bytes_per_block
from model.transformer import Transformer
from service.engine.scheduler import Scheduled


@dataclass(frozen=True, slots=True)
class Traffic:
    """One model's needs. `windows` has each layer's sliding window, None where there is none."""

    weight_bytes: int  # read by a decode step; of the embedding, only a head tied to it
    head_bytes: int  # of them, the head's: read where a next token is drawn
    kv_bytes_per_token: int  # of all layers
    layer_parameters: int  # of the matrices in all layers
    head_parameters: int
    query_size: int
    windows: tuple[int | None, ...]

    def decode(self, contexts: Sequence[int]) -> tuple[float, float]:
        """(bytes, operations) of a step that decodes one token of each sequence; a context
        counts the token itself."""
        if any(self.windows):
            return self.step([(context - 1, 1) for context in contexts], len(contexts))
        pairs = len(self.windows) * sum(contexts)
        return self._needs(pairs, pairs, len(contexts), len(contexts))

    def step(self, spans: Sequence[tuple[int, int]], num_drawn: int) -> tuple[float, float]:
        """(bytes, operations) of any step: for each sequence how many of its tokens were computed
        before and how many are now, and how many sequences draw their next token."""
        num_layers = len(self.windows)
        num_tokens = sum([count for _, count in spans])
        if any(self.windows):
            keys_read, pairs = self._seen_through_windows(spans)
        else:
            keys_read = num_layers * sum([start + count for start, count in spans])
            pairs = num_layers * sum([n * start + n * (n + 1) // 2 for start, n in spans])
        return self._needs(keys_read, pairs, num_tokens, num_drawn)

    def _needs(
        self, keys_read: int, pairs: int, num_tokens: int, num_drawn: int
    ) -> tuple[float, float]:
        """(bytes, operations); keys and pairs of a query and a key are those of all layers."""
        weights = self.weight_bytes if num_drawn else self.weight_bytes - self.head_bytes
        num_bytes = weights + keys_read / len(self.windows) * self.kv_bytes_per_token
        matrices = 2.0 * (num_tokens * self.layer_parameters + num_drawn * self.head_parameters)
        return num_bytes, matrices + 4.0 * pairs * self.query_size

    def prefill_flops(self, num_cached: int, prompt_len: int) -> float:
        """Operations of a prompt whose first `num_cached` tokens were found in the cache;
        logits are wanted of its last token."""
        return self.step([(num_cached, prompt_len - num_cached)], 1)[1]

    def _seen_through_windows(self, spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Keys that are read, and pairs of a query and a key it sees; over all layers."""
        keys_read = pairs = 0
        for window, layers in Counter(self.windows).items():
            for start, count in spans:
                end = start + count
                reach = end if window is None else window
                keys_read += layers * min(end, count - 1 + reach)
                pairs += layers * (_pairs(end, reach) - _pairs(start, reach))
        return keys_read, pairs


def needs(traffic: Traffic, scheduled: list[Scheduled]) -> tuple[float, float]:
    """Bytes and operations of a step that has not been launched yet."""
    if all(item.num_tokens == 1 for item in scheduled):  # most steps, and short ones
        return traffic.decode([item.sequence.num_computed + 1 for item in scheduled])
    spans = [(item.sequence.num_computed, item.num_tokens) for item in scheduled]
    return traffic.step(spans, sum(item.samples for item in scheduled))


def _pairs(num_queries: int, window: int) -> int:
    """Pairs of the first queries of a sequence and the keys that they see: 1 + 2 + ... up to the
    window, and the window's size from there on."""
    rising = min(num_queries, window)
    return rising * (rising + 1) // 2 + window * (num_queries - rising)


def traffic_of(config: ModelConfig, dtype: torch.dtype, *, int8: bool = False) -> Traffic:
    """Count an architecture's matrices; `int8`: a byte a weight, keys and values in `dtype`."""
    with torch.device("meta"):
        model = Transformer(config, max_positions=1)
    return traffic_of_model(model, dtype, int8=int8)


def traffic_of_model(model: Transformer, dtype: torch.dtype, *, int8: bool = False) -> Traffic:
    """The same of a model that is there, on whatever device."""
    config = model.config
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    tables = [model.embedding, model.position_embedding]
    outside = sum(table.weight.numel() for table in tables if table is not None)
    head = config.vocab_size * config.hidden_size
    read = num_parameters - outside + (head if config.tie_embeddings else 0)
    bytes_per_weight = 1 if int8 else dtype.itemsize
    matrices = [p.numel() for p in model.blocks.parameters() if p.dim() == 2]
    return Traffic(
        weight_bytes=read * bytes_per_weight,
        head_bytes=head * bytes_per_weight,
        kv_bytes_per_token=bytes_per_block(config, 1, dtype),
        layer_parameters=sum(matrices),
        head_parameters=head,
        query_size=config.query_size,
        windows=config.sliding_windows or (None,) * config.num_layers,
    )
