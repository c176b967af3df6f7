"""Causal self-attention: each token asks (query), the earlier ones answer (key, value).

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V          (Vaswani et al. 2017, eq. 1)

`scaled_dot_product` is that line. `SelfAttention` makes Q, K and V from the hidden states,
and leaves where the earlier keys lie to a backend.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from model.backends.base import AttentionStep
from model.config import ModelConfig
from model.layers import RMSNorm
from model.linear import Linear
from model.positions import RotaryPositions, apply_rotary


def scaled_dot_product(
    queries: Float[Tensor, "*heads num_queries head_dim"],
    keys: Float[Tensor, "*heads num_keys head_dim"],
    values: Float[Tensor, "*heads num_keys value_dim"],
    visible: Bool[Tensor, "num_queries num_keys"] | None = None,
) -> tuple[
    Float[Tensor, "*heads num_queries value_dim"], Float[Tensor, "*heads num_queries num_keys"]
]:
    """The equation itself; returns the output and the weights, whose rows sum to 1.

    `visible[i, j]` says whether query i may see key j; every query must see at least one.
    """
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    weights = torch.softmax(scores, dim=-1)
    return weights @ values, weights


def causal_mask(
    num_queries: int, num_keys: int, window: int | None = None
) -> Bool[Tensor, "num_queries num_keys"]:
    """Which keys each query may see, the last query standing at the last key: itself and
    everything before it, or with a window only the latest `window` of those."""
    query = torch.arange(num_keys - num_queries, num_keys)[:, None]
    key = torch.arange(num_keys)[None, :]
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


class SelfAttention(nn.Module):
    """Projections, query/key norm and rotary positions around a backend's attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.window = config.window(layer)
        # One product for all three; rows are [queries | keys | values].
        self.qkv = Linear(
            config.hidden_size, config.query_size + 2 * config.kv_size, bias=config.qkv_bias
        )
        self.out = Linear(config.query_size, config.hidden_size, bias=config.attention_out_bias)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def heads(
        self, qkv: Float[Tensor, "num_tokens qkv_size"], rotary: RotaryPositions | None
    ) -> tuple[
        Float[Tensor, "num_tokens num_heads head_dim"],
        Float[Tensor, "num_tokens num_kv_heads head_dim"],
        Float[Tensor, "num_tokens num_kv_heads head_dim"],
    ]:
        """Queries, keys and values of the product, normed and turned to their positions."""
        queries, keys, values = qkv.view(qkv.shape[0], -1, self.head_dim).split(
            (self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1
        )
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if rotary is not None:
            cos, sin = rotary.cos_sin(qkv.dtype)
            queries, keys = apply_rotary(queries, cos, sin), apply_rotary(keys, cos, sin)
        return queries, keys, values

    def forward(
        self,
        hidden: Float[Tensor, "num_tokens hidden"],
        residual: Float[Tensor, "num_tokens hidden"],
        rotary: RotaryPositions | None,
        attend: AttentionStep,
    ) -> Float[Tensor, "num_tokens hidden"]:
        """`residual` plus what each token gathers from the ones it may see."""
        out: Tensor = self.out(attend(self, self.qkv(hidden), rotary), residual)
        return out
