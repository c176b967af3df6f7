"""y = x W^T + b with one tile shape whatever the number of rows: for deterministic mode.

cuBLAS chooses another kernel, with another order of additions, for another number of rows. Here
every output is one chain of additions over the inputs in order, `INPUTS` at a time in one shape of
tensor core product, so that a row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from model.kernels.gpu.tile import dot

ROWS = 64
OUTPUTS = 64
INPUTS = 64
# Row tiles that share the weights they read from the L2 cache.
GROUP = 8


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    has_bias: tl.constexpr,
    rows: tl.constexpr,
    outputs: tl.constexpr,
    inputs: tl.constexpr,
    group: tl.constexpr,
):
    # Programs in bands of `group` row tiles: neighbours in time read the same weights.
    num_row_tiles, num_output_tiles = tl.cdiv(num_rows, rows), tl.cdiv(num_outputs, outputs)
    band = tl.program_id(0) // (group * num_output_tiles)
    first = band * group
    in_band = tl.minimum(num_row_tiles - first, group)
    within = tl.program_id(0) % (group * num_output_tiles)
    row = (first + within % in_band) * rows + tl.arange(0, rows)
    output = within // in_band * outputs + tl.arange(0, outputs)
    x_row = (row % num_rows).to(tl.int64)[:, None] * num_inputs
    weight_row = (output % num_outputs).to(tl.int64)[:, None] * num_inputs
    acc = tl.zeros((rows, outputs), tl.float32)
    for start in range(0, num_inputs, inputs):
        column = start + tl.arange(0, inputs)[None, :]
        a = tl.load(x + x_row + column, mask=column < num_inputs, other=0.0)
        b = tl.load(weight + weight_row + column, mask=column < num_inputs, other=0.0)
        acc = dot(a, tl.trans(b), acc)
    if has_bias:
        acc += tl.load(bias + output, mask=output < num_outputs, other=0.0).to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * num_outputs + output[None, :]
    inside = (row < num_rows)[:, None] & (output < num_outputs)[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


def fixed_product(
    x: Float[Tensor, "rows in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None,
) -> Float[Tensor, "rows out_features"]:
    """The product of contiguous `x` and `weight`, plus `bias`, in the dtype of `x`."""
    num_rows, (num_outputs, num_inputs) = x.shape[0], weight.shape
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    num_tiles = triton.cdiv(num_rows, ROWS) * triton.cdiv(num_outputs, OUTPUTS)
    _product_kernel[(num_tiles,)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        num_rows,
        num_outputs,
        num_inputs,
        has_bias=bias is not None,
        rows=ROWS,
        outputs=OUTPUTS,
        inputs=INPUTS,
        group=GROUP,
        num_warps=4,
        num_stages=4,
        enable_fp_fusion=True,
    )
    return out


def fixed_product_twin(
    x: Float[Tensor, "rows in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None,
) -> Float[Tensor, "rows out_features"]:
    """`fixed_product` in PyTorch, without its promise."""
    return F.linear(x, weight, bias)
