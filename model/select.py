"""Which forward serves: the fastest one that can, and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model import compiled, cpu
from model.backends.cpu import CpuBackend
from model.backends.reference import ReferenceBackend
from model.compiled import CompiledForward
from model.cpu import RowPadding
from model.forward import EagerForward, Forward
from model.kernels.native import NativeKernelError
from model.kv_cache import KVCache
from model.parallel import Group
from model.transformer import Transformer

Weights = Literal["plain", "int8", "float8"]


class WeightsUnavailableError(Exception):
    """Weights in int8 or float8 were asked for, and nothing here can run them; the message says
    why."""


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
    weights: Weights = "plain",
    padding: RowPadding | None = None,
) -> Selection:
    """The forward for the device that the cache lies on. Takes the model's weights over:
    what else runs the model afterwards runs on the weights that serve. `padding`: found before on
    this machine for this model, and not looked for again.

    Raises `WeightsUnavailableError`.
    """
    if cache.keys.device.type != "cpu":
        return _select_gpu(model, cache, deterministic, weights)
    weight_bytes = _parameter_bytes(model)
    int8 = weights == "int8"
    if weights == "float8":
        raise WeightsUnavailableError("float8 products are for GPUs; a CPU has int8")
    reason = compiled.unsupported(model.config, cache) or ""
    if not reason:
        try:
            forward = CompiledForward(model, cache, int8=int8)
            weight_bytes = forward.nbytes + _parameter_bytes(model)
            return Selection(forward, "cpu-compiled", weight_bytes, RowPadding())
        except NativeKernelError as error:
            reason = str(error)
    if int8:
        raise WeightsUnavailableError(reason)
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


def _select_gpu(
    model: Transformer, cache: KVCache, deterministic: bool, weights: Weights
) -> Selection:
    """Triton's kernels; without triton the written-out equation, right and slow."""
    if weights == "int8":
        raise WeightsUnavailableError("int8 products are for CPUs; a GPU has float8")
    try:  # here, not above: torch's CPU builds come without triton
        from model.backends.cuda import CudaBackend
        from model.fused import FusedForward
        from model.products import (
            MakeProduct,
            fixed_product,
            float8_product,
            library_product,
        )
    except ImportError as error:
        reason = f"no kernels for {cache.keys.device.type}: {error}"
        if weights == "float8":
            raise WeightsUnavailableError(reason) from error
        backend = ReferenceBackend(model.config, cache)
        return Selection(
            EagerForward(model, backend), "reference", _parameter_bytes(model), None, (reason,)
        )
    misses: tuple[str, ...] = ()
    make_product: MakeProduct = library_product
    if weights == "float8":
        make_product = float8_product
        if deterministic:
            misses = ("float8 products have no fixed tiles: tokens may depend on the load",)
            deterministic = False
    cuda = CudaBackend(model.config, cache, model.max_positions, deterministic)
    if deterministic:
        make_product = fixed_product(cuda.kernels)
    forward = FusedForward(model, cuda, make_product=make_product)
    padding = RowPadding() if deterministic else None
    return Selection(forward, "cuda", _parameter_bytes(model) + forward.nbytes, padding, misses)


def select_part(
    model: Transformer, cache: KVCache, group: Group, *, deterministic: bool
) -> Selection:
    """The forward of a part of a model (model/parallel.py): Triton's kernels on a GPU, their
    twins on a CPU, where parts are for trying out. Raises `ImportError` without triton."""
    from model.backends.cuda import CudaBackend
    from model.exchange import Exchange
    from model.fused import FusedForward
    from model.kernels.gpu.kernels import TRITON, TWINS
    from model.products import fixed_product, library_product

    on_gpu = cache.keys.device.type != "cpu"
    kernels = TRITON if on_gpu else TWINS
    misses: tuple[str, ...] = ()
    if deterministic and not (on_gpu and group.size == 2):
        misses = ("tokens may depend on the load: " + _why_not_deterministic(on_gpu),)
        deterministic = False
    backend = CudaBackend(model.config, cache, model.max_positions, deterministic, kernels)
    forward = FusedForward(
        model,
        backend,
        make_product=fixed_product(kernels) if deterministic else library_product,
        exchange=Exchange(group, model),
    )
    padding = RowPadding() if deterministic else None
    name = "cuda" if on_gpu else "cuda-twins"
    return Selection(forward, name, _parameter_bytes(model), padding, misses)


def _why_not_deterministic(on_gpu: bool) -> str:
    if on_gpu:  # of two numbers there is one sum; of more it hangs on the order
        return "sums over more than two GPUs are added in an order that their number of rows moves"
    return "a CPU's products in parts are not padded"


def _parameter_bytes(model: Transformer) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
