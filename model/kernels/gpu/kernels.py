"""The kernels as one set, and their twins as another: what a GPU's forward is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from model.kernels.gpu import adjust, decode, draw, embed, gate, norm, prefill, product, rotary


@dataclass(frozen=True, slots=True)
class Kernels:
    """Signatures stand in the modules of the same names."""

    embed: Callable[..., Any]
    add_norm: Callable[..., Any]
    rotary_write: Callable[..., Any]
    decode_attention: Callable[..., Any]
    prefill_attention: Callable[..., Any]
    silu_mul: Callable[..., Any]
    fixed_product: Callable[..., Any]
    adjust: Callable[..., Any]
    draw: Callable[..., Any]


TRITON = Kernels(
    embed.embed,
    norm.add_norm,
    rotary.rotary_write,
    decode.decode_attention,
    prefill.prefill_attention,
    gate.silu_mul,
    product.fixed_product,
    adjust.adjust,
    draw.draw,
)
TWINS = Kernels(
    embed.embed_twin,
    norm.add_norm_twin,
    rotary.rotary_write_twin,
    decode.decode_attention_twin,
    prefill.prefill_attention_twin,
    gate.silu_mul_twin,
    product.fixed_product_twin,
    adjust.adjust_twin,
    draw.draw_twin,
)
