"""SiLU(gate) * up, the middle of a SwiGLU MLP (Shazeer 2020), in one pass.

GPT-2's GELU has no gate: there torch's own kernel is one pass already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


@triton.jit
def _silu_mul_kernel(gate_up, out, size, width: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * width + tl.arange(0, width)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * size + column, gated.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Float[Tensor, "rows twice_size"]) -> Float[Tensor, "rows size"]:
    """`gate_up` holds the gates of a row and then its ups."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    width = min(1024, triton.next_power_of_2(size))
    _silu_mul_kernel[(rows, triton.cdiv(size, width))](
        gate_up, out, size, width=width, enable_fp_fusion=True
    )
    return out


def silu_mul_twin(gate_up: Float[Tensor, "rows twice_size"]) -> Float[Tensor, "rows size"]:
    """`silu_mul` in PyTorch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
