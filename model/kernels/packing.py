"""Weights laid out in the order in which the compiled product reads them.

16 outputs are a unit. Within a unit the inputs follow each other (float32) or go in pairs
(bfloat16 and int8), and each input's or pair's 16 outputs lie side by side: one register of
weights after another. model/kernels/linear.c tells why.

int8 keeps one scale an output: weight = scale * round(weight / scale), scale = the row's
largest magnitude / 127. Only weights are rounded; the products are those of bfloat16.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from model.kernels import native, structs
from model.kernels.native import LANES
from model.linear import Linear

WeightKind = Literal["float32", "bfloat16", "int8"]
PANEL_OUTPUTS = 64  # outputs of a product that one thread takes at a time


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """y = x W^T + b, packed. `gated`: W is [gate | up], whose units alternate here."""

    kind: WeightKind
    in_features: int
    out_features: int
    gated: bool
    weight: Tensor
    scale: Float[Tensor, " padded_out"] | None  # int8
    bias: Float[Tensor, " padded_out"] | None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and their scales."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def struct(self) -> structs.Linear:
        """For the kernel; good while this object lives."""
        return structs.Linear(
            self.in_features,
            self.out_features,
            structs.KINDS[self.kind],
            self.weight.data_ptr(),
            None if self.scale is None else self.scale.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
        )

    def product(self, x: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows out_features"]:
        """x W^T + b in float32, as the compiled forward computes it; x has the weights' type,
        or bfloat16 for int8."""
        wanted = torch.float32 if self.kind == "float32" else torch.bfloat16
        if x.dtype != wanted or x.shape[1] != self.in_features:
            raise TypeError(
                f"a product of {self.kind} weights for {self.in_features} inputs takes "
                f"{wanted}, got {x.dtype} {tuple(x.shape)}"
            )
        x, threads = x.contiguous(), torch.get_num_threads()
        out = torch.empty(x.shape[0], self.out_features)
        panels = x.new_empty(threads if self.kind == "int8" else 0, PANEL_OUTPUTS, x.shape[1])
        native.load().vitrine_product(
            ctypes.byref(self.struct()),
            x.data_ptr(),
            x.shape[0],
            x.dtype == torch.bfloat16,
            out.data_ptr(),
            panels.data_ptr(),
            threads,
        )
        return _gates_apart(out.T).T if self.gated else out

    def unpacked(self) -> Float[Tensor, "out_features in_features"]:
        """The weight as it was, or as int8 left it; bfloat16 for int8."""
        outputs_first = (0, 2, 1) if self.kind == "float32" else (0, 2, 1, 3)
        rows = self.weight.permute(outputs_first).reshape(-1, self.in_features)
        if self.scale is not None:
            rows = (rows.float() * self.scale[:, None]).bfloat16()
        if self.gated:
            rows = _gates_apart(rows)
        return rows[: self.out_features].contiguous()


def pack(linear: Linear, kind: WeightKind, *, gated: bool = False) -> PackedLinear:
    """Lay a plain product out. in_features must be even, and for `gated` half of the outputs
    a multiple of 16."""
    rows = linear.plain_weight().detach()
    bias = None if linear.bias is None else linear.bias.detach().float()
    if gated:
        rows = _gates_alternating(rows)
        bias = None if bias is None else _gates_alternating(bias[:, None])[:, 0].contiguous()
    missing = -rows.shape[0] % LANES
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        bias = None if bias is None else torch.nn.functional.pad(bias, (0, missing))
    scale = None
    if kind == "int8":
        rows = rows.float()
        scale = (rows.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        rows = (rows / scale[:, None]).round_().to(torch.int8)
    else:
        rows = rows.to(getattr(torch, kind))
    units = rows.view(-1, LANES, linear.in_features)
    if kind == "float32":
        packed = units.permute(0, 2, 1)
    else:
        packed = units.unflatten(2, (-1, 2)).permute(0, 2, 1, 3)
    return PackedLinear(
        kind,
        linear.in_features,
        linear.out_features,
        gated,
        # a contiguous copy, never the weight itself: the plain one is dropped after this
        packed.clone(memory_format=torch.contiguous_format),
        scale,
        bias,
    )


def _gates_alternating(rows: Float[Tensor, "two_sizes width"]) -> Float[Tensor, "two_sizes width"]:
    gate, up = (half.unflatten(0, (-1, LANES)) for half in rows.chunk(2))
    alternating: Tensor = torch.stack((gate, up), dim=1).flatten(0, 2)
    return alternating


def _gates_apart(rows: Float[Tensor, "two_sizes width"]) -> Float[Tensor, "two_sizes width"]:
    apart: Tensor = rows.unflatten(0, (-1, 2, LANES)).transpose(0, 1).flatten(0, 2)
    return apart
