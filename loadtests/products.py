"""The compiled products alone, at the shapes of a model and for some numbers of rows.

    python -m loadtests.products --dtype float32,bfloat16 --rows 1,8,24,32,64,128

Each shape has enough copies of its weights that they come from memory, as in a step. Prints
GFLOP/s and the GB/s of weights that they imply. A machine changes its speed: compare two commits in
turns.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

from model.threads import set_wait_policy

set_wait_policy(os.environ)  # before torch is imported

import torch
from rich.console import Console
from rich.table import Table

from model.kernels.packing import PackedLinear, pack
from model.linear import Linear

GPT2 = "768x2304,768x768,768x3072,3072x768,768x50256"
MEMORY_BYTES = 150_000_000  # of the copies of a shape: more than the caches hold


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.products", description=__doc__)
    parser.add_argument("--dtype", default="float32,bfloat16", help="also int8")
    parser.add_argument("--shapes", default=GPT2, help="inputs x outputs; without it, gpt2's")
    parser.add_argument("--rows", default="1,8,24,32,64,128")
    parser.add_argument("--repeat", type=int, default=7, help="the median counts")
    parser.add_argument("--threads", type=int, help="without it, torch's choice")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    rows = [int(number) for number in given.rows.split(",")]
    table = Table("dtype", "inputs x outputs", *(f"{number} rows" for number in rows))
    for kind in given.dtype.split(","):
        for shape in given.shapes.split(","):
            inputs, outputs = map(int, shape.split("x"))
            packed = copies(kind, inputs, outputs)
            cells = [cell(packed, number, given.repeat) for number in rows]
            table.add_row(kind, f"{inputs} x {outputs}", *cells)
    Console().print(table)


@torch.inference_mode()
def copies(kind: str, inputs: int, outputs: int) -> list[PackedLinear]:
    """Random weights of this shape, several times over."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    first = pack(random_linear(inputs, outputs, dtype), kind)  # type: ignore[arg-type]
    count = max(1, MEMORY_BYTES // first.nbytes)
    others = (random_linear(inputs, outputs, dtype) for _ in range(count - 1))
    return [first, *(pack(one, kind) for one in others)]  # type: ignore[arg-type]


def random_linear(inputs: int, outputs: int, dtype: torch.dtype) -> Linear:
    linear = Linear(inputs, outputs, bias=False).to(dtype)
    linear.plain_weight().normal_()
    return linear


@torch.inference_mode()
def cell(packed: list[PackedLinear], num_rows: int, repeat: int) -> str:
    """GFLOP/s, and GB/s of weights read once for all rows."""
    one = packed[0]
    x = torch.randn(num_rows, one.in_features)
    x = x if one.kind == "float32" else x.bfloat16()
    times = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        for weights in packed:
            weights.product(x)
        times.append((time.perf_counter() - began) / len(packed))
    took_s = median(times[1:])  # the first one warms up
    flops = 2 * num_rows * one.in_features * one.out_features
    return f"{flops / took_s / 1e9:,.0f} ({one.nbytes / took_s / 1e9:.0f} GB/s)"


if __name__ == "__main__":
    main()
