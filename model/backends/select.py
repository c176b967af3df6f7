"""Which backend serves: the fastest one that can, and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass

from model.backends import cpu_native
from model.backends.base import AttentionBackend
from model.backends.cpu import CpuBackend
from model.backends.cpu_native import NativeCpuBackend
from model.backends.reference import ReferenceBackend
from model.config import ModelConfig
from model.kernels.native import NativeKernelError
from model.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Selection:
    """A backend, its name for /info, and why it is not a faster one (empty: it is the best)."""

    backend: AttentionBackend
    name: str
    reason: str = ""


def select_backend(config: ModelConfig, cache: KVCache) -> Selection:
    """The backend for the device that the cache lies on."""
    if cache.keys.device.type != "cpu":
        # Until the Triton kernels are here, other devices run the written-out equation:
        # right, and slow.
        reason = f"there are no kernels for {cache.keys.device.type} yet"
        return Selection(ReferenceBackend(config, cache), "reference", reason)
    reason = cpu_native.unsupported(config, cache) or ""
    if not reason:
        try:
            return Selection(NativeCpuBackend.create(config, cache), "cpu-native")
        except NativeKernelError as error:
            reason = str(error)
    return Selection(CpuBackend(config, cache), "cpu-torch", reason)
