"""The GPU's forward against transformers, family by family, and its promises to the bit."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from model.backends.cuda import CudaBackend
from model.backends.reference import ReferenceBackend
from model.batch import ForwardBatch, single_sequence
from model.checkpoint import load_checkpoint
from model.config import ModelConfig
from model.forward import EagerForward, Forward
from model.fused import FusedForward
from model.kernels.gpu.kernels import TRITON, TWINS
from model.kv_cache import KVCache
from model.products import fixed_product
from tests.engine.engines import TINY_COMPILED, TINY_GPT2, random_model
from tests.model.gpu.setting import DEVICE
from tests.model.parity import BOUND, CASES, Case, make_oracle, our_logits, prompt


def on_device(batch: ForwardBatch, device: torch.device) -> ForwardBatch:
    """The batch with its tensors there."""
    moved = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return ForwardBatch(
        **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in moved.items()}
    )


FAST = ("gpt2: tied",)
# What differs to this code; the rest of the cases differs to the loader.
SLOW = (
    "llama: biases everywhere",
    "llama: yarn rope, mscale, not truncated",
    "mistral: window 16",
    "qwen3: tied, head_dim 8, biases",
)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in FAST else [pytest.mark.slow])
        for case in CASES
        if case.name in FAST + SLOW
    ],
)
def test_logits_are_those_of_transformers(case: Case, tmp_path: Path) -> None:
    """A prompt in two chunks, over pages in disorder."""
    oracle = make_oracle(case, tmp_path)
    ids = prompt(19)
    ours = our_logits(load_checkpoint(tmp_path), "cuda", ids, 12)
    assert float((ours - oracle.logits(ids)).abs().max()) <= BOUND


@pytest.mark.parametrize("config", [TINY_COMPILED, TINY_GPT2], ids=["rmsnorm", "layernorm"])
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_the_twins_are_the_transformer(config: ModelConfig, is_deterministic: bool) -> None:
    """In PyTorch, where a prompt can be long: fused against the layers of the model."""
    model = random_model(config)
    ids = list(range(1, 120))
    logits = []
    for kernels in (None, TWINS):
        cache = KVCache.allocate(config, num_blocks=9, block_size=16, dtype=torch.float32)
        forward: Forward = EagerForward(model, ReferenceBackend(config, cache))
        if kernels is not None:
            backend = CudaBackend(config, cache, 256, is_deterministic, kernels)
            forward = FusedForward(model, backend, make_product=fixed_product(kernels))
        parts = [
            single_sequence(ids[a:b], start=a, block_table=list(range(9)), block_size=16)
            for a, b in ((0, 50), (50, 118), (118, 119))
        ]
        logits.append(torch.cat([forward(part) for part in parts]))
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_mode_gives_a_token_the_same_bits_however_it_was_computed(
    dtype: torch.dtype,
) -> None:
    """Whole, in chunks and one by one, alone and beside another sequence."""
    config = replace(TINY_COMPILED, num_layers=1, sliding_windows=(7,))
    model = random_model(config).to(DEVICE, dtype)
    model.place_position_tables(DEVICE)
    rows = []
    for cuts in ((0, 12), (0, 5, 12), (0, 10, 11, 12)):
        cache = KVCache.allocate(
            config, num_blocks=2, block_size=16, dtype=dtype, device=DEVICE, by_token=True
        )
        backend = CudaBackend(config, cache, 256, is_deterministic=True)
        forward = FusedForward(model, backend, make_product=fixed_product(TRITON))
        for start, end in pairwise(cuts):
            ids = list(range(1 + start, 1 + end))
            batch = single_sequence(ids, start=start, block_table=[1], block_size=16)
            logits = forward(on_device(batch, DEVICE))
        rows.append(logits[-1])
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
