"""Attention without a cache, for training: every row of the batch is a whole sequence.

Differentiable; the sequences all have the same length, which is what a training batch is.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.config import ModelConfig


class DenseAttention:
    """Causal attention over `batch_size` sequences of equal length, flattened into rows."""

    def __init__(self, config: ModelConfig, batch_size: int) -> None:
        if config.sliding_windows and any(w is not None for w in config.sliding_windows):
            raise ValueError(
                f"training has no sliding-window attention; got windows {config.sliding_windows}"
            )
        self.batch_size = batch_size

    def __call__(
        self,
        layer: int,
        queries: Float[Tensor, "num_tokens num_heads head_dim"],
        keys: Float[Tensor, "num_tokens num_kv_heads head_dim"],
        values: Float[Tensor, "num_tokens num_kv_heads head_dim"],
    ) -> Float[Tensor, "num_tokens num_heads head_dim"]:
        q, k, v = (
            x.view(self.batch_size, -1, *x.shape[1:]).transpose(1, 2)
            for x in (queries, keys, values)
        )
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).reshape(queries.shape)
