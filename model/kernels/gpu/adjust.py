"""Penalties, bias and tokens held off, at the few places of the logits that they concern.

The host knows which tokens a sequence holds, all but perhaps the last one, which was drawn on the
GPU a moment ago and not read yet. So it sends, for each place, what to subtract as things stand
and what to subtract if that place is the unread token once more, and the kernel picks. Sums are
made on the host in float64 and rounded once, as in model/adjustments.py: the bits are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 256  # entries at a time


@dataclass(frozen=True, slots=True)
class AdjustRows:
    """What is done to each row. Entries of row i are `starts[i]` .. `starts[i + 1]`; int32, a
    float by its bits."""

    penalty_starts: Int[Tensor, " rows_plus_1"]
    # token id, what to subtract, what to subtract if it is the unread token
    penalties: Int[Tensor, "entries 3"]
    bias_starts: Int[Tensor, " rows_plus_1"]
    # token id, what to add; -inf holds a token off
    biases: Int[Tensor, "entries 2"]
    repetition: Float[Tensor, " rows"]  # 1: off
    # The seat of a sequence with penalties whose last token the host has not read, else -1, and
    # what to subtract from that token if it is not listed.
    unread_seats: Int[Tensor, " rows"]
    unread_amounts: Float[Tensor, " rows"]


@triton.jit
def _penalized(logit, repetition, amount):
    changed = tl.where(logit > 0, tl.div_rn(logit, repetition), logit * repetition)
    return tl.where(repetition == 1.0, logit, changed) - amount


@triton.jit
def _adjust_kernel(
    logits,
    penalty_starts,
    penalties,
    bias_starts,
    biases,
    repetitions,
    unread_seats,
    unread_amounts,
    last_tokens,
    vocab_size,
    chunk: tl.constexpr,
):
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * vocab_size
    repetition = tl.load(repetitions + row)
    seat = tl.load(unread_seats + row)
    unread = tl.load(last_tokens + tl.maximum(seat, 0))
    unread = tl.where(seat >= 0, unread, -1)
    is_listed = tl.full((), 0, tl.int32)
    for first in range(tl.load(penalty_starts + row), tl.load(penalty_starts + row + 1), chunk):
        index = first + tl.arange(0, chunk)
        inside = index < tl.load(penalty_starts + row + 1)
        token = tl.load(penalties + index * 3, mask=inside, other=-2)
        amount = tl.load(penalties + index * 3 + 1, mask=inside, other=0)
        if_unread = tl.load(penalties + index * 3 + 2, mask=inside, other=0)
        amount = tl.where(token == unread, if_unread, amount).to(tl.float32, bitcast=True)
        logit = tl.load(line + token, mask=inside, other=0.0)
        tl.store(line + token, _penalized(logit, repetition, amount), mask=inside)
        is_listed = tl.maximum(is_listed, tl.max((token == unread).to(tl.int32), axis=0))
    if (unread >= 0) & (is_listed == 0):
        logit = tl.load(line + unread)
        tl.store(line + unread, _penalized(logit, repetition, tl.load(unread_amounts + row)))
    tl.debug_barrier()  # other threads add to what these wrote
    for first in range(tl.load(bias_starts + row), tl.load(bias_starts + row + 1), chunk):
        index = first + tl.arange(0, chunk)
        inside = index < tl.load(bias_starts + row + 1)
        token = tl.load(biases + index * 2, mask=inside, other=0)
        amount = tl.load(biases + index * 2 + 1, mask=inside, other=0).to(tl.float32, bitcast=True)
        logit = tl.load(line + token, mask=inside, other=0.0)
        tl.store(line + token, logit + amount, mask=inside)


def adjust(
    logits: Float[Tensor, "rows vocab_size"],
    rows: AdjustRows,
    last_tokens: Int[Tensor, " num_seats"],
) -> None:
    """Change float32 `logits` in place."""
    _adjust_kernel[(logits.shape[0],)](
        logits,
        rows.penalty_starts,
        rows.penalties,
        rows.bias_starts,
        rows.biases,
        rows.repetition,
        rows.unread_seats,
        rows.unread_amounts,
        last_tokens,
        logits.shape[1],
        chunk=CHUNK,
        num_warps=4,
        enable_fp_fusion=False,  # a product and a sum are rounded each, as on the host
    )


def adjust_twin(
    logits: Float[Tensor, "rows vocab_size"],
    rows: AdjustRows,
    last_tokens: Int[Tensor, " num_seats"],
) -> None:
    """`adjust` in PyTorch, a row at a time."""
    for row, line in enumerate(logits):
        repetition = rows.repetition[row]
        seat = int(rows.unread_seats[row])
        unread = int(last_tokens[seat]) if seat >= 0 else -1
        entries = rows.penalties[rows.penalty_starts[row] : rows.penalty_starts[row + 1]]
        tokens = entries[:, 0].long()
        amounts = torch.where(tokens == unread, entries[:, 2], entries[:, 1]).view(torch.float32)
        if unread >= 0 and not bool((tokens == unread).any()):
            tokens = torch.cat((tokens, tokens.new_tensor([unread])))
            amounts = torch.cat((amounts, rows.unread_amounts[row : row + 1]))
        before = line[tokens]
        changed = torch.where(before > 0, before / repetition, before * repetition)
        line[tokens] = (before if repetition == 1 else changed) - amounts
        entries = rows.biases[rows.bias_starts[row] : rows.bias_starts[row + 1]]
        line[entries[:, 0].long()] += entries[:, 1].contiguous().view(torch.float32)
