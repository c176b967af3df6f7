"""Norms and MLPs: what a block does to each token on its own."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from model.config import ModelConfig
from model.linear import Linear


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 at least (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "rows size"]) -> Float[Tensor, "rows size"]:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    """The config's norm over hidden_size."""
    if config.norm == "layernorm":
        return LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps)


class GeluMLP(nn.Module):
    """residual + down(GELU(up x)); GPT-2 uses the tanh form of GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.approximate: Literal["tanh", "none"] = "tanh" if config.mlp == "gelu_tanh" else "none"
        self.up = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(
        self,
        x: Float[Tensor, "num_tokens hidden"],
        residual: Float[Tensor, "num_tokens hidden"],
    ) -> Float[Tensor, "num_tokens hidden"]:
        out: Tensor = self.down(self.up.gelu(x, self.approximate), residual)
        return out


class SwiGLUMLP(nn.Module):
    """residual + down(SiLU(gate x) * (up x)); gate and up are one product.

    Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(
            config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias
        )
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(
        self,
        x: Float[Tensor, "num_tokens hidden"],
        residual: Float[Tensor, "num_tokens hidden"],
    ) -> Float[Tensor, "num_tokens hidden"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up, residual)
        return out


def make_mlp(config: ModelConfig) -> nn.Module:
    """The config's MLP."""
    return SwiGLUMLP(config) if config.mlp == "swiglu" else GeluMLP(config)
