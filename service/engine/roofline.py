"""What the machine can do, measured in the same run as the engine.

Williams et al. 2009 (doi:10.1145/1498765.1498785): a computation that reads `b` bytes and
does `f` operations takes at least max(b / bandwidth, f / peak) seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.linear import Linear

GEMM_MIN_SIZE = 512


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is read, and how large products grow: until one takes `gemm_long_s` or the limit
    is reached."""

    read_bytes: int
    read_repeats: int
    gemm_max_size: int
    gemm_long_s: float
    gemm_repeats: int


# A few seconds: far beyond any cache, large enough for the peak, and a second where the dtype has
# no fast product.
THOROUGH = Effort(2**30, 7, 8192, 0.1, 3)
# A moment, for a server that has nothing else to do: beyond most caches, near the peak.
QUICK = Effort(2**28, 3, 1024, 0.02, 2)


@dataclass(frozen=True, slots=True)
class Roofline:
    """The best that was seen of both, with the engine's threads and in its dtype."""

    read_bytes_per_s: float
    flops_per_s: float
    gemm_size: int  # of the square product that reached it

    def least_s(self, num_bytes: float, flops: float) -> float:
        """The shortest time that the machine could do this in."""
        return max(num_bytes / self.read_bytes_per_s, flops / self.flops_per_s)


def measure_roofline(
    device: torch.device, dtype: torch.dtype, effort: Effort = THOROUGH
) -> Roofline:
    """Takes as long as `effort` has it and, for a moment, its `read_bytes` of memory."""
    flops_per_s, size = measure_flops(device, dtype, effort)
    return Roofline(measure_reading(device, effort), flops_per_s, size)


@torch.inference_mode()
def measure_reading(device: torch.device, effort: Effort) -> float:
    """Bytes a second. A sum reads each value once and writes nothing; all threads take part."""
    numbers = torch.ones(effort.read_bytes // 4, dtype=torch.float32, device=device)
    elapsed_s = min(_timed(numbers.sum, device) for _ in range(effort.read_repeats))
    return numbers.nbytes / elapsed_s


@torch.inference_mode()
def measure_flops(device: torch.device, dtype: torch.dtype, effort: Effort) -> tuple[float, int]:
    """Operations a second, and the size of the square product that reached them."""
    best, best_size, size = 0.0, GEMM_MIN_SIZE, GEMM_MIN_SIZE
    while True:
        shortest_s = min(
            _timed(product, device)
            for product in _products(size, device, dtype)
            for _ in range(effort.gemm_repeats)
        )
        if 2 * size**3 / shortest_s > best:
            best, best_size = 2 * size**3 / shortest_s, size
        if shortest_s > effort.gemm_long_s or size * 2 > effort.gemm_max_size:
            return best, best_size
        size *= 2


def _products(
    size: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Callable[[], Tensor]]:
    """The same product in the ways there are: torch's own and the engine's packed one, which
    is faster in float32 on some processors."""
    rows = torch.ones(size, size, dtype=dtype, device=device)
    weight = torch.ones(size, size, dtype=dtype, device=device)
    yield lambda: rows @ weight
    if device.type == "cpu" and dtype != torch.float16:
        layer = Linear(size, size, bias=False).to(dtype)
        try:
            layer.pack(keep_weight=False)
        except (RuntimeError, AttributeError):  # model/cpu.py says so in the log
            return
        yield lambda: layer(rows)


def _timed(function: Callable[[], Tensor], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
