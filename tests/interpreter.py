"""Triton's interpreter, with products whose bits a test may rely on.

A GPU's tile gives each row of a product the same bits wherever in the tile it lies. The interpreter
hands its tiles to NumPy's BLAS, which promises no such thing: on some processors (AMD's family 26)
a row's bits depend on its place among the others. Here a product is one chain of additions over k.
What is tested for its bits is then the rest: masks, tiling, what a step computes beside what.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sum_products_in_order() -> None:
    """Change `tl.dot` of this process's interpreter; nothing where triton is not installed."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        left, right = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype)
        total = np.zeros_like(d.data)
        for k in range(left.shape[-1]):
            total += left[..., :, k : k + 1] * right[..., k : k + 1, :]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
