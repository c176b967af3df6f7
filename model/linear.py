"""y = x W^T + b, the product that a step spends most of its time in.

Plain, it is `torch.nn.functional.linear`. Packed (`Linear.pack`), the weight is laid out once
for oneDNN, which reads it from memory 1.5-3 times as fast when there are few rows, and
takes the activation or the residual after the product along (loadtests/NOTES.md). Where
compiled code serves (model/compiled.py), it keeps the weight in its own layout, and computes
this module's products from it when somebody still calls it, to explain or to compare.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Rows that oneDNN chooses the layout for. The layouts for 8 and for 512 rows are the same on
# the processors measured; the one for 1 row gives it other bits than it has among others.
PACKED_FOR_ROWS = 64


class PackedWeight(Protocol):
    """A weight in somebody else's layout."""

    def product(self, x: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows out_features"]:
        """x W^T + b, float32."""
        ...

    def unpacked(self) -> Float[Tensor, "out_features in_features"]:
        """The weight, made anew."""
        ...


class Linear(nn.Module):
    """A weight (out_features, in_features) and perhaps a bias (out_features)."""

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.packed: Tensor | None = None
        self.replaced: PackedWeight | None = None
        if not self.weight.is_meta:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as torch.nn.Linear does

    def forward(
        self, x: Float[Tensor, "rows in_features"], residual: Tensor | None = None
    ) -> Float[Tensor, "rows out_features"]:
        """The product, plus `residual` (rows, out_features) if there is one."""
        if self.packed is not None:
            if residual is None:
                out: Tensor = _onednn()(x, self.packed, self.bias, "none", [], "")
            else:
                out = _onednn().binary(x, residual, self.packed, self.bias, "add")
            return out
        product = self.product(x).to(x.dtype)
        return product if residual is None else residual + product

    def gelu(
        self, x: Float[Tensor, "rows in_features"], approximate: Literal["none", "tanh"]
    ) -> Float[Tensor, "rows out_features"]:
        """GELU of the product."""
        if self.packed is not None:
            out: Tensor = _onednn()(x, self.packed, self.bias, "gelu", [], approximate)
            return out
        return F.gelu(self.product(x).to(x.dtype), approximate=approximate)

    def product(self, x: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows out_features"]:
        """The product as it comes: float32 where compiled code makes it, otherwise x's type."""
        if self.packed is not None:
            out: Tensor = self(x)
            return out
        if self.replaced is not None:
            return self.replaced.product(x)
        return F.linear(x, self.weight, self.bias)

    def pack(self, *, keep_weight: bool) -> None:
        """Lay the weight out for oneDNN; the plain one is dropped unless `keep_weight` (it
        is the embedding too). Raises RuntimeError where oneDNN cannot take it."""
        weight = self.weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        if not keep_weight:
            self._drop_weight()

    def replace_weight(self, packed: PackedWeight, *, keep_plain: bool) -> None:
        """From now on products are made with `packed`; the plain weight is dropped unless
        `keep_plain` (it is the embedding too)."""
        self.replaced = packed
        if not keep_plain:
            self._drop_weight()

    def plain_weight(self) -> Float[Tensor, "out_features in_features"]:
        """The weight that products are made with, wherever it is kept. Not for a module packed
        for oneDNN, which does not give it back."""
        return self.weight if self.replaced is None else self.replaced.unpacked()

    def _drop_weight(self) -> None:
        nothing = self.weight.new_empty(0, self.in_features)
        self.weight = nn.Parameter(nothing, requires_grad=False)


def _onednn() -> torch._ops.OpOverloadPacket:
    packet: torch._ops.OpOverloadPacket = torch.ops.mkldnn._linear_pointwise
    return packet
