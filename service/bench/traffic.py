"""How many bytes a step must read and how many operations it must do, from the architecture.

Only what no implementation can avoid is counted: each weight once a step, the keys and
values that a query sees, two operations for a multiplication and its addition. Activations,
norms' arithmetic, the sampler and rows that pad a step are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.inspection import inspect
from model.kv_cache import bytes_per_block


@dataclass(frozen=True, slots=True)
class Traffic:
    """One model's needs. `windows` has each layer's sliding window, None where there is none."""

    weight_bytes: int  # read by a decode step; of the embedding, only a head tied to it
    kv_bytes_per_token: int  # of all layers
    layer_parameters: int  # of the matrices in all layers
    head_parameters: int
    query_size: int
    windows: tuple[int | None, ...]

    def decode(self, contexts: Sequence[int]) -> tuple[float, float]:
        """(bytes, operations) of a step that decodes one token of each sequence; a context
        counts the token itself."""
        visible = sum(self._visible(context) for context in contexts)  # keys, over all layers
        kv_bytes = visible / len(self.windows) * self.kv_bytes_per_token
        matrices = 2.0 * len(contexts) * (self.layer_parameters + self.head_parameters)
        return self.weight_bytes + kv_bytes, matrices + 4.0 * visible * self.query_size

    def prefill_flops(self, num_cached: int, prompt_len: int) -> float:
        """Operations of a prompt whose first `num_cached` tokens were found in the cache;
        logits are wanted of its last token."""
        visible = sum(self._visible(context) for context in range(num_cached + 1, prompt_len + 1))
        matrices = 2.0 * (prompt_len - num_cached) * self.layer_parameters
        return matrices + 2.0 * self.head_parameters + 4.0 * visible * self.query_size

    def _visible(self, context: int) -> int:
        if not any(self.windows):
            return context * len(self.windows)
        return sum(context if window is None else min(context, window) for window in self.windows)


def traffic_of(config: ModelConfig, dtype: torch.dtype, *, int8: bool = False) -> Traffic:
    """Count an architecture's matrices; `int8`: a byte a weight, keys and values in `dtype`."""
    inspection = inspect(config)
    outside = sum(m.total for m in inspection.matrices if m.group == "embedding")
    head = config.vocab_size * config.hidden_size
    read = inspection.num_parameters - outside + (head if config.tie_embeddings else 0)
    in_layers = sum(
        matrix.total
        for matrix in inspection.matrices
        if matrix.group in ("attention", "MLP") and len(matrix.shape) == 2
    )
    return Traffic(
        weight_bytes=read * (1 if int8 else dtype.itemsize),
        kv_bytes_per_token=bytes_per_block(config, 1, dtype),
        layer_parameters=in_layers,
        head_parameters=head,
        query_size=config.query_size,
        windows=config.sliding_windows or (None,) * config.num_layers,
    )
