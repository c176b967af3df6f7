"""Make a loaded model fast on the CPU: weights packed once, compiled kernels for what lies
between the products; and find out which bits it can promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels import native
from model.kernels.native import LANES, NativeKernelError
from model.layers import LayerNorm, RMSNorm, SwiGLUMLP
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


# From free to dearer. A single row is special in float32, for some shapes, to oneDNN's products;
# MKL's float32 products treat the 1-3 rows left over from fours differently.
PADDINGS = (RowPadding(), RowPadding(minimum=2), RowPadding(multiple=4))


def optimise(model: Transformer) -> list[str]:
    """Pack every weight and switch to compiled kernels where they can serve; in place.
    Returns what could not be done and why, a line each."""
    return [miss for miss in (pack_weights(model), use_compiled_kernels(model)) if miss]


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


def use_compiled_kernels(model: Transformer) -> str | None:
    """Let norms and SwiGLU run compiled where their sizes allow; why not, if there are no
    compiled kernels. (Query and key norms are part of the attention kernel.)"""
    try:
        kernels = native.load()
    except NativeKernelError as error:
        return f"no compiled kernels: {error}"
    config = model.config
    for module in model.modules():
        if isinstance(module, RMSNorm | LayerNorm) and module.weight.shape[0] == config.hidden_size:
            module.native = kernels if config.hidden_size % LANES == 0 else None
        elif isinstance(module, SwiGLUMLP):
            module.native = kernels if config.intermediate_size % LANES == 0 else None
    return None


@torch.inference_mode()
def choose_padding(model: Transformer) -> RowPadding | None:
    """The cheapest padding under which all that this model does to rows gives each the same
    bits whatever their number, measured on this machine; None if there is none."""
    functions = list(_row_functions(model))
    # torch's reductions treat a single row differently, in a norm too rarely visible after
    # rounding to be left to measurement.
    paddings = PADDINGS if _norms_are_compiled(model) else PADDINGS[1:]
    for padding in paddings:
        if all(
            _holds(function, width, model.embedding.weight, padding)
            for function, width in functions
        ):
            return padding
    return None


def _norms_are_compiled(model: Transformer) -> bool:
    norms = [m for m in model.modules() if isinstance(m, RMSNorm | LayerNorm)]
    hidden_size, head_dim = model.config.hidden_size, model.config.head_dim
    outer = all(norm.native is not None for norm in norms if norm.weight.shape[0] == hidden_size)
    return outer and (not model.config.qk_norm or head_dim % LANES == 0)


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
