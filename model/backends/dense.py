"""Attention without a cache, for training: every row of the batch is a whole sequence.

Differentiable; the sequences all have the same length, which is what a training batch is.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.attention import SelfAttention
from model.config import ModelConfig
from model.positions import RotaryPositions


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
        attention: SelfAttention,
        qkv: Float[Tensor, "num_tokens qkv_size"],
        rotary: RotaryPositions | None,
    ) -> Float[Tensor, "num_tokens query_size"]:
        q, k, v = (
            heads.unflatten(0, (self.batch_size, -1)).transpose(1, 2)
            for heads in attention.heads(qkv, rotary)
        )
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).reshape(qkv.shape[0], -1)
