"""What the engine does when it has nothing to do: measure, once, what its machine can do.

Only then: a start must not wait for it, and beside requests it would measure what they leave.
"""

from __future__ import annotations

import logging
import time

import torch

from service.engine.messages import Measured
from service.engine.roofline import QUICK, measure_flops, measure_reading

log = logging.getLogger("vitrine.engine")

# Idle for so long before it begins: a standby that starts beside a new engine keeps a core busy
# for about two seconds.
QUIET_S = 4.0
# A longer gap between two looks had work in it.
_LOOK_S = 1.0


class IdleRoofline:
    """`look` is to be called whenever there is no work, twice a second. A request that comes while
    one of the two halves is measured waits for it."""

    def __init__(self, device: torch.device, dtype: str, num_devices: int = 1) -> None:
        """`dtype` as `ModelInfo` has it. `num_devices` are like `device`, and all work at once."""
        self._num_devices = num_devices
        self.is_over = False  # measured, or given up
        self._device = device
        self._dtype = torch.bfloat16 if dtype in ("int8", "float8") else getattr(torch, dtype)
        self._quiet_since_s = self._looked_s = time.monotonic()
        self._read_bytes_per_s: float | None = None

    def look(self) -> Measured | None:
        """What was measured, once both halves are."""
        now_s = time.monotonic()
        if now_s - self._looked_s > _LOOK_S:
            self._quiet_since_s = now_s
        self._looked_s = now_s
        if self.is_over or now_s - self._quiet_since_s < QUIET_S:
            return None
        try:
            measured = self._measure()
        except (RuntimeError, MemoryError) as error:  # torch's way to say that memory is short
            log.warning("the roofline could not be measured: %s", error)
            self.is_over = True
            return None
        self._looked_s = time.monotonic()
        self.is_over = measured is not None
        return measured

    def _measure(self) -> Measured | None:
        """One half; both together after the second."""
        if self._read_bytes_per_s is None:
            self._read_bytes_per_s = measure_reading(self._device, QUICK) * self._num_devices
            return None
        flops_per_s, _ = measure_flops(self._device, self._dtype, QUICK)
        return Measured(self._read_bytes_per_s, flops_per_s * self._num_devices)
