"""Which forward serves: the fastest one that can, and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass

from model import compiled, cpu
from model.backends.cpu import CpuBackend
from model.backends.reference import ReferenceBackend
from model.compiled import CompiledForward
from model.cpu import RowPadding
from model.forward import EagerForward, Forward
from model.kernels.native import NativeKernelError
from model.kv_cache import KVCache
from model.transformer import Transformer


class Int8UnavailableError(Exception):
    """Weights in int8 were asked for, and nothing here can run them; the message says why."""


@dataclass(frozen=True, slots=True)
class Selection:
    """A forward, its name for /info, to how many rows its batches must be padded for
    deterministic mode (None: nothing it is known to do makes it deterministic), and what could
    not be had, a line each."""

    forward: Forward
    name: str
    weight_bytes: int  # held for the model, layouts for speed included
    padding: RowPadding | None
    misses: tuple[str, ...] = ()


def select_forward(
    model: Transformer,
    cache: KVCache,
    *,
    deterministic: bool,
    int8: bool = False,
    padding: RowPadding | None = None,
) -> Selection:
    """The forward for the device that the cache lies on. Takes the model's weights over:
    what else runs the model afterwards runs on the weights that serve. `padding`: found before on
    this machine for this model, and not looked for again.

    Raises `Int8UnavailableError`.
    """
    weight_bytes = _parameter_bytes(model)
    if cache.keys.device.type != "cpu":
        # Until the Triton kernels are here, other devices run the written-out equation:
        # right, and slow.
        reason = f"there are no kernels for {cache.keys.device.type} yet"
        if int8:
            raise Int8UnavailableError(reason)
        backend = ReferenceBackend(model.config, cache)
        return Selection(EagerForward(model, backend), "reference", weight_bytes, None, (reason,))
    reason = compiled.unsupported(model.config, cache) or ""
    if not reason:
        try:
            forward = CompiledForward(model, cache, int8=int8)
            weight_bytes = forward.nbytes + _parameter_bytes(model)
            return Selection(forward, "cpu-compiled", weight_bytes, RowPadding())
        except NativeKernelError as error:
            reason = str(error)
    if int8:
        raise Int8UnavailableError(reason)
    misses = [f"no compiled forward: {reason}", *filter(None, [cpu.pack_weights(model)])]
    if not deterministic:
        padding = RowPadding()
    elif padding is None:
        padding = cpu.choose_padding(model)
    if padding is None:
        misses.append(
            "this processor gives a row other bits beside other rows whatever the padding: "
            "tokens may depend on the load"
        )
    eager = EagerForward(model, CpuBackend(model.config, cache))
    return Selection(eager, "cpu-torch", weight_bytes, padding, tuple(misses))


def _parameter_bytes(model: Transformer) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
