"""Ways to make the product of a `Linear` on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
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
