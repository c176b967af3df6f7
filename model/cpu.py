"""PyTorch on the CPU, where there is no compiled forward: weights packed for oneDNN, and rows
padded so that deterministic mode can promise its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.linear import Linear
from model.transformer import Block, Transformer

# Row counts whose results are compared with those among MANY_ROWS.
MANY_ROWS = 259
FEW_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 17, 32, 33, 64, 130, 256)
# Numbers compared for each count, where there are so many: rounding to bf16 hides all but some
# 1 in 10,000 of the differences that another order of additions makes.
NUM_COMPARED = 500_000


@dataclass(frozen=True, slots=True)
class RowPadding:
    """To how many rows a step's products are padded, so that a row's bits do not depend on
    how many others there are."""

    minimum: int = 1
    multiple: int = 1

    def padded(self, rows: int) -> int:
        """The number of rows to run for `rows` wanted ones."""
        return max(self.minimum, -(-rows // self.multiple) * self.multiple)


# From cheap to dearer. A single row is special to torch's reductions, in a norm too rarely visible
# after rounding to be left to measurement; MKL's float32 products treat the 1-3 rows left over
# from fours differently.
PADDINGS = (RowPadding(minimum=2), RowPadding(multiple=4))


def pack_weights(model: Transformer) -> str | None:
    """Lay every weight out for oneDNN; why not, if it cannot take them."""
    if model.embedding.weight.dtype == torch.float16:
        return "weights are not packed: oneDNN has no fast float16 product on CPUs"
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            try:
                module.pack(keep_weight=module.weight is model.embedding.weight)
            except (RuntimeError, AttributeError) as error:
                reason = str(error).splitlines()[0]
                return f"the weights of {name} and what follows are not packed: {reason}"
    return None


@torch.inference_mode()
def choose_padding(model: Transformer) -> RowPadding | None:
    """The cheapest padding under which all that this model does to rows gives each the same
    bits whatever their number, measured on this machine; None if there is none."""
    functions = list(_row_functions(model))
    for padding in PADDINGS:
        if all(
            _holds(function, width, model.embedding.weight, padding)
            for function, width in functions
        ):
            return padding
    return None


def _row_functions(model: Transformer) -> Iterator[tuple[Callable[[Tensor], Tensor], int]]:
    """What is done to rows outside attention, and how wide they are; all blocks are alike."""
    hidden_size = model.config.hidden_size
    block = model.blocks[0]
    if not isinstance(block, Block):
        raise TypeError(f"a transformer of {type(block).__name__}")
    yield block.attention_norm, hidden_size
    yield block.attention.qkv, hidden_size
    yield block.attention.out, model.config.query_size
    yield lambda rows: block.mlp(rows, rows), hidden_size
    yield model.logits, hidden_size


def _holds(
    function: Callable[[Tensor], Tensor], width: int, like: Tensor, padding: RowPadding
) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(MANY_ROWS + 1, width, generator=generator).to(like.dtype)
    many = function(rows)
    return all(_same_in_fewer(function, rows, many, count, padding) for count in FEW_ROWS)


def _same_in_fewer(
    function: Callable[[Tensor], Tensor],
    rows: Tensor,
    many: Tensor,
    count: int,
    padding: RowPadding,
) -> bool:
    """Whether `count` rows at a time, padded, give the bits that they have among all."""
    padded = padding.padded(count)
    num_windows = -(-NUM_COMPARED // (count * many.shape[1]))
    for start in range(0, rows.shape[0] - padded + 1, count)[:num_windows]:
        few = function(rows[start : start + padded])
        if not torch.equal(few[:count], many[start : start + count]):
            return False
    return True
