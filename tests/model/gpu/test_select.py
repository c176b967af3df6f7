"""What is chosen where the cache lies on a GPU, shown on a CPU."""

from __future__ import annotations

import pytest
import torch

from model import select
from model.backends.cuda import CudaBackend
from model.batch import single_sequence
from model.fused import FusedForward
from model.kernels.gpu.kernels import TWINS
from model.kv_cache import KVCache
from model.products import float8_product, to_float8
from model.select import Weights, WeightsUnavailableError
from tests.engine.engines import TINY_COMPILED, random_model


def cache() -> KVCache:
    return KVCache.allocate(
        TINY_COMPILED, num_blocks=4, block_size=16, dtype=torch.bfloat16, by_token=True
    )


@pytest.mark.parametrize(
    ("deterministic", "weights", "is_deterministic"),
    [(True, "plain", True), (False, "plain", False), (True, "float8", False)],
)
def test_a_gpu_gets_the_kernels(
    deterministic: bool, weights: Weights, is_deterministic: bool
) -> None:
    model = random_model(TINY_COMPILED).to(torch.bfloat16)
    chosen = select._select_gpu(model, cache(), deterministic, weights)
    assert chosen.name == "cuda"
    assert isinstance(chosen.forward, FusedForward)
    assert chosen.forward.backend.is_deterministic == is_deterministic
    assert (chosen.padding is not None) == is_deterministic
    assert bool(chosen.misses) == (weights == "float8")


def test_int8_is_for_cpus() -> None:
    with pytest.raises(WeightsUnavailableError, match="a GPU has float8"):
        select._select_gpu(random_model(TINY_COMPILED), cache(), True, "int8")


def test_float8_is_for_gpus() -> None:
    with pytest.raises(WeightsUnavailableError, match="a CPU has int8"):
        select.select_forward(
            random_model(TINY_COMPILED), cache(), deterministic=True, weights="float8"
        )


def test_float8_keeps_three_bits_of_a_fraction() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 100
    rounded, scale = to_float8(x)
    assert ((rounded.float() * scale - x).abs() <= x.abs() / 16 + scale / 2**9).all()


def test_float8_weights_give_nearly_the_same_logits() -> None:
    """The products are torch's own; its CPU has them too."""
    ids, logits, nbytes = list(range(1, 30)), [], []
    for make_product in (None, float8_product):
        model = random_model(TINY_COMPILED).to(torch.bfloat16)
        backend = CudaBackend(TINY_COMPILED, cache(), 256, kernels=TWINS)
        forward = (
            FusedForward(model, backend)
            if make_product is None
            else FusedForward(model, backend, make_product=make_product)
        )
        logits.append(forward(single_sequence(ids, block_table=[2, 1], block_size=16)))
        nbytes.append(sum(p.nbytes for p in model.parameters()) + forward.nbytes)
    correlation = torch.corrcoef(torch.stack([part.flatten() for part in logits]))[0, 1]
    assert 0.98 < correlation < 0.99999
    assert nbytes[1] < 0.75 * nbytes[0]
