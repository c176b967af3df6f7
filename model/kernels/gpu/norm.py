"""Residual addition and the norm after it in one pass over the row.

    residual += update;  normed = norm(residual)

RMSNorm (Zhang and Sennrich 2019) where there is no bias, LayerNorm (Ba et al. 2016) where there
is one. One program a row, so that a row's sums are taken in the same order whatever the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


@triton.jit
def _add_norm_kernel(
    residual,
    update,
    weight,
    bias,
    normed,
    size,
    eps,
    has_update: tl.constexpr,
    is_layernorm: tl.constexpr,
    width: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, width)
    inside = column < size
    x = tl.load(residual + start + column, mask=inside, other=0.0)
    if has_update:
        added = tl.load(update + start + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        tl.store(residual + start + column, x, mask=inside)
    x = x.to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if is_layernorm:
        mean = tl.sum(x, axis=0) / size
        x = tl.where(inside, x - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    y = x * scale * w
    if is_layernorm:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + start + column, y.to(normed.dtype.element_ty), mask=inside)


def add_norm(
    residual: Float[Tensor, "rows size"],
    update: Float[Tensor, "rows size"] | None,
    weight: Float[Tensor, " size"],
    bias: Float[Tensor, " size"] | None,
    eps: float,
) -> Float[Tensor, "rows size"]:
    """The norm of `residual` + `update`; `residual` is changed in place to that sum. Without an
    `update`, the norm of `residual`."""
    rows, size = residual.shape
    normed = torch.empty_like(residual)
    width = triton.next_power_of_2(size)
    _add_norm_kernel[(rows,)](
        residual,
        residual if update is None else update,
        weight,
        weight if bias is None else bias,
        normed,
        size,
        eps,
        has_update=update is not None,
        is_layernorm=bias is not None,
        width=width,
        num_warps=min(16, max(1, width // 512)),
        enable_fp_fusion=True,
    )
    return normed


def add_norm_twin(
    residual: Float[Tensor, "rows size"],
    update: Float[Tensor, "rows size"] | None,
    weight: Float[Tensor, " size"],
    bias: Float[Tensor, " size"] | None,
    eps: float,
) -> Float[Tensor, "rows size"]:
    """`add_norm` in PyTorch."""
    if update is not None:
        residual.add_(update)
    x = residual.float()
    if bias is not None:
        y = F.layer_norm(x, weight.shape, weight.float(), bias.float(), eps)
    else:
        y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    return y.to(residual.dtype)
