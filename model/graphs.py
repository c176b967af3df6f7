"""A fixed piece of device work that is launched as a whole.

A decode step of a small model is some hundred kernels of a few microseconds each: launched one by
one, the GPU waits for the host. A CUDA graph holds them all, with their arguments, and is launched
in one call. So whatever it reads must lie where it lay when the graph was captured, and what it
writes is overwritten by the next launch. On a CPU the work is simply done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
Pool = Any  # torch's handle of one; None where there are no graphs

# Runs before a capture: kernels are compiled and libraries make their workspaces then.
WARM_UPS = 2


class Recorded(Generic[T]):
    """`work`, recorded on construction. `launch` does it again and gives what it gave: the same
    tensors, with new numbers in them. Graphs with a `pool` in common share their scratch memory;
    capture the largest first, and only one of them may run at a time."""

    def __init__(self, work: Callable[[], T], device: torch.device, pool: Pool) -> None:
        self._work = work
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._result = work()

    def launch(self) -> T:
        """Start the work; on a CPU, do it."""
        if self._graph is None:
            return self._work()
        self._graph.replay()
        return self._result


def new_pool(device: torch.device) -> Pool:
    """A pool for graphs to share."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
