"""Numbers on their way to the device and back, without anybody waiting for them.

Memory of the host that the device reads by itself must be pinned, and must not be written again
before it was read: an event says when. On a CPU there is no device to wait for.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Steps whose numbers may be under way at once: the one that runs and the one being prepared.
NUM_BUFFERS = 2


class Event:
    """A point in the device's work."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until the device has come to it."""
        if self._event is not None:
            self._event.synchronize()


class Upload:
    """A buffer on the device and those on the host that fill it in turns."""

    def __init__(self, size: int, device: torch.device) -> None:
        is_pinned = device.type == "cuda"
        self.size = size
        self.on_device = torch.zeros(size, dtype=torch.int32, device=device)
        self._device = device
        self._on_host = [
            torch.zeros(size, dtype=torch.int32, pin_memory=is_pinned) for _ in range(NUM_BUFFERS)
        ]
        self._copied: list[Event | None] = [None] * NUM_BUFFERS
        self._turn = 0

    def begin(self) -> NDArray[np.int32]:
        """The next buffer to write, once the device has read what is in it."""
        self._turn = (self._turn + 1) % NUM_BUFFERS
        if (copied := self._copied[self._turn]) is not None:
            copied.wait()
        buffer: NDArray[np.int32] = self._on_host[self._turn].numpy()
        return buffer

    def send(self, count: int) -> None:
        """Copy the first `count` numbers of that buffer, after the work launched so far."""
        self.on_device[:count].copy_(self._on_host[self._turn][:count], non_blocking=True)
        self._copied[self._turn] = Event(self._device)


def download(tensor: Tensor) -> Tensor:
    """A copy on the host, whose numbers are there once an `Event` made afterwards has passed."""
    is_pinned = tensor.device.type == "cuda"
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
    return host.copy_(tensor, non_blocking=True)
