"""Token embedding, and learned positions if there are any, of ids that may not have left the GPU.

An id below 0 is a reference: -1 - seat means the token that was last drawn for that seat
(service/engine/device_runner.py). So a step can be launched before the host has read the tokens of
the one before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor


@triton.jit
def _embed_kernel(
    ids,
    positions,
    last_tokens,
    table,
    position_table,
    out,
    hidden_size,
    has_positions: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * width + tl.arange(0, width)
    inside = column < hidden_size
    token = tl.load(ids + row)
    if token < 0:
        token = tl.load(last_tokens + (-1 - token))
    hidden = tl.load(table + token.to(tl.int64) * hidden_size + column, mask=inside, other=0.0)
    if has_positions:
        place = tl.load(positions + row).to(tl.int64)
        learned = tl.load(position_table + place * hidden_size + column, mask=inside, other=0.0)
        hidden = (hidden.to(tl.float32) + learned.to(tl.float32)).to(hidden.dtype)
    tl.store(out + row.to(tl.int64) * hidden_size + column, hidden, mask=inside)


def embed(
    ids: Int[Tensor, " num_tokens"],
    positions: Int[Tensor, " num_tokens"],
    last_tokens: Int[Tensor, " num_seats"],
    table: Float[Tensor, "vocab_size hidden"],
    position_table: Float[Tensor, "max_positions hidden"] | None,
) -> Float[Tensor, "num_tokens hidden"]:
    """Rows of `table`, plus rows of `position_table`. Ids and seats are int32 and must exist:
    nothing checks them on the device."""
    hidden_size = table.shape[1]
    out = torch.empty(ids.shape[0], hidden_size, dtype=table.dtype, device=table.device)
    width = min(1024, triton.next_power_of_2(hidden_size))
    _embed_kernel[(ids.shape[0], triton.cdiv(hidden_size, width))](
        ids,
        positions,
        last_tokens,
        table,
        table if position_table is None else position_table,
        out,
        hidden_size,
        has_positions=position_table is not None,
        width=width,
        enable_fp_fusion=True,
    )
    return out


def embed_twin(
    ids: Int[Tensor, " num_tokens"],
    positions: Int[Tensor, " num_tokens"],
    last_tokens: Int[Tensor, " num_seats"],
    table: Float[Tensor, "vocab_size hidden"],
    position_table: Float[Tensor, "max_positions hidden"] | None,
) -> Float[Tensor, "num_tokens hidden"]:
    """`embed` in PyTorch."""
    tokens = torch.where(ids < 0, last_tokens[(-1 - ids).clamp(min=0)], ids)
    hidden = table[tokens]
    return hidden if position_table is None else hidden + position_table[positions]
