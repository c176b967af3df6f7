"""Ways to make the product of a `Linear` on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.kernels.gpu.kernels import Kernels
from model.linear import Linear

Product = Callable[[Tensor], Tensor]
MakeProduct = Callable[[Linear], Product]


def library_product(linear: Linear) -> Product:
    """cuBLAS, the fastest; a row's bits depend on how many rows there are."""
    weight, bias = linear.weight, linear.bias
    return lambda x: F.linear(x, weight, bias)


def fixed_product(kernels: Kernels) -> MakeProduct:
    """One tile shape for any number of rows: for deterministic mode."""

    def make(linear: Linear) -> Product:
        weight, bias = linear.weight, linear.bias

        def product(x: Tensor) -> Tensor:
            out: Tensor = kernels.fixed_product(x, weight, bias)
            return out

        return product

    return make


FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0  # its largest number (arXiv:2209.05433)


def to_float8(
    x: Float[Tensor, "rows columns"],
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows 1"]]:
    """(numbers in float8, each row's scale, float32): their product is nearly `x`."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / FLOAT8_MAX
    return (x.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale


class Float8Product:
    """Weights in float8, a scale for each output; rows are rounded likewise as they come. The
    plain weight is dropped. Needs a GPU with float8 products and sizes of multiples of 16."""

    def __init__(self, linear: Linear) -> None:
        self._weight, self._scale = to_float8(linear.weight.detach())
        self._bias, self._dtype = linear.bias, linear.weight.dtype
        linear.replace_weight(self, keep_plain=False)

    def __call__(self, x: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows out_features"]:
        rounded, scale = to_float8(x)
        out: Tensor = torch._scaled_mm(
            rounded,
            self._weight.t(),
            scale_a=scale,
            scale_b=self._scale.t(),
            out_dtype=torch.bfloat16,
        )
        return out if self._bias is None else out + self._bias

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + self._scale.nbytes

    def product(self, x: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows out_features"]:
        """As a `PackedWeight`."""
        return self(x.to(torch.bfloat16)).float()

    def unpacked(self) -> Float[Tensor, "out_features in_features"]:
        """The weight as it was rounded, made anew."""
        return (self._weight.float() * self._scale).to(self._dtype)


def float8_product(linear: Linear) -> Product:
    """In float8 where the sizes allow."""
    if linear.in_features % 16 or linear.out_features % 16:
        return library_product(linear)
    return Float8Product(linear)
