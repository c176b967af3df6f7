"""The compiled kernels against their PyTorch twins, and what happens without a compiler."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import SelfAttention
from model.backends.cpu import CpuBackend
from model.backends.cpu_native import NativeCpuBackend
from model.backends.select import select_backend
from model.batch import single_sequence
from model.config import ModelConfig
from model.cpu import PADDINGS, RowPadding, choose_padding, optimise
from model.kernels import native
from model.kv_cache import KVCache
from model.layers import LayerNorm, RMSNorm, SwiGLUMLP
from model.positions import RotaryPositions, rotary_table
from tests.engine.engines import TINY_NATIVE, random_model

BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]


def config(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, *, qk_norm: bool
) -> ModelConfig:
    return ModelConfig(
        vocab_size=8,
        hidden_size=32,
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=32,
        max_positions=256,
        sliding_windows=(window,),
        qk_norm=qk_norm,
    )


@given(
    heads=st.sampled_from([(4, 4), (4, 2), (9, 3), (6, 1)]),
    head_dim=st.sampled_from([16, 32, 48, 64, 128]),
    block_size=st.sampled_from([16, 32, 64]),
    window=st.sampled_from([None, 1, 20, 64]),
    qk_norm=st.booleans(),
    rotary=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.integers(1, 150),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_attention_equals_its_twin_and_chunks_change_no_bit(
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    window: int | None,
    qk_norm: bool,
    rotary: bool,
    dtype: torch.dtype,
    num_tokens: int,
    seed: int,
) -> None:
    shape = config(*heads, head_dim, window, qk_norm=qk_norm)
    generator = torch.Generator().manual_seed(seed)
    attention = SelfAttention(shape, layer=0).to(dtype).requires_grad_(False)
    for norm in (attention.query_norm, attention.key_norm):
        if norm is not None:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
    width = shape.query_size + 2 * shape.kv_size
    qkv = torch.randn(num_tokens, width, generator=generator).to(dtype)
    num_blocks = -(-num_tokens // block_size)
    table = torch.randperm(num_blocks, generator=generator).tolist()
    cos, sin = rotary_table(shape, shape.max_positions)

    def run(backend: CpuBackend | NativeCpuBackend, start: int, end: int) -> Tensor:
        batch = single_sequence(
            list(range(end - start)), start=start, block_table=table, block_size=block_size
        )
        positions = RotaryPositions(cos, sin, batch.positions) if rotary else None
        return backend.begin(batch)(attention, qkv[start:end], positions)

    def cache() -> KVCache:
        return KVCache.allocate(shape, num_blocks=num_blocks, block_size=block_size, dtype=dtype)

    ours, twins = cache(), cache()
    whole = run(NativeCpuBackend.create(shape, ours), 0, num_tokens)
    twin = run(CpuBackend(shape, twins), 0, num_tokens)
    bound = BOUND[dtype] * (1 + float(twin.abs().max()))
    assert (whole.float() - twin.float()).abs().max() <= bound
    assert (ours.keys.float() - twins.keys.float()).abs().max() <= bound * 4
    assert torch.equal(ours.values, twins.values)

    chunked = NativeCpuBackend.create(shape, cache())
    parts, start = [], 0
    while start < num_tokens:
        size = int(torch.randint(1, 50, (1,), generator=generator))
        parts.append(run(chunked, start, min(start + size, num_tokens)))
        start += size
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_norms_and_swiglu_equal_their_twins(dtype: torch.dtype, rows: int) -> None:
    shape = dataclasses.replace(TINY_NATIVE, hidden_size=48, intermediate_size=112)
    generator = torch.Generator().manual_seed(rows)
    x = (torch.randn(rows, 48, generator=generator) * 3).to(dtype)
    residual = torch.zeros(rows, 48, dtype=dtype)
    rms_norm = RMSNorm(48, 1e-5).to(dtype).requires_grad_(False)
    layer_norm = LayerNorm(48, 1e-5).to(dtype).requires_grad_(False)
    for parameter in (rms_norm.weight, layer_norm.weight, layer_norm.bias):
        parameter.uniform_(0.5, 1.5, generator=generator)
    mlp = SwiGLUMLP(shape).to(dtype).requires_grad_(False)
    plain = rms_norm(x), layer_norm(x + 2), mlp(x, residual)
    rms_norm.native = layer_norm.native = mlp.native = native.load()
    compiled = rms_norm(x), layer_norm(x + 2), mlp(x, residual)
    for ours, twin in zip(compiled, plain, strict=True):
        assert (ours.float() - twin.float()).abs().max() <= BOUND[dtype] * (
            1 + float(twin.abs().max())
        )


def test_silu_at_the_ends_of_the_range() -> None:
    """No overflow, no NaN, and a NaN stays one. The kernel's exp is 0 below -87, so that
    88 * e^-88 = 5e-37 may become 0."""
    gate = torch.tensor([-1e30, -100.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 1e30] * 2)[None]
    both = torch.cat((gate, torch.ones_like(gate)), dim=1)
    expected = torch.nn.functional.silu(gate)
    assert torch.allclose(native.load().silu_mul(both), expected, rtol=1e-6, atol=1e-36)
    both[0, 3] = float("nan")
    assert native.load().silu_mul(both)[0, 3].isnan()


def test_a_nan_in_a_query_reaches_the_output() -> None:
    """The sampler must see it: a kernel that hid it would serve noise as text."""
    shape = config(4, 2, 16, None, qk_norm=False)
    cache = KVCache.allocate(shape, num_blocks=1, block_size=16, dtype=torch.float32)
    attention = SelfAttention(shape, layer=0)
    qkv = torch.randn(3, shape.query_size + 2 * shape.kv_size)
    qkv[1, 0] = float("nan")
    batch = single_sequence([1, 2, 3], block_table=[0], block_size=16)
    out = NativeCpuBackend.create(shape, cache).begin(batch)(attention, qkv, None)
    assert out[1].isnan().any()
    assert not out[0].isnan().any()


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype", "reason"),
    [
        (24, 32, torch.float32, "head_dim 24"),
        (32, 8, torch.float32, "block_size 8"),
        (32, 32, torch.float16, "float16"),
    ],
)
def test_what_the_kernel_cannot_do_runs_on_the_twin_and_says_why(
    head_dim: int, block_size: int, dtype: torch.dtype, reason: str
) -> None:
    shape = config(2, 2, head_dim, None, qk_norm=False)
    cache = KVCache.allocate(shape, num_blocks=1, block_size=block_size, dtype=dtype)
    selection = select_backend(shape, cache)
    assert selection.name == "cpu-torch"
    assert reason in selection.reason


def test_without_a_compiler_the_twin_serves_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native.load.cache_clear()
    try:
        shape = config(2, 2, 16, None, qk_norm=False)
        cache = KVCache.allocate(shape, num_blocks=1, block_size=16, dtype=torch.float32)
        selection = select_backend(shape, cache)
        assert selection.name == "cpu-torch"
        assert "no C compiler" in selection.reason
        assert any("no C compiler" in line for line in optimise(random_model(TINY_NATIVE)))
    finally:
        native.load.cache_clear()


def test_a_compiler_that_fails_is_reported_with_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(compiler))
    native.load.cache_clear()
    try:
        with pytest.raises(native.NativeKernelError, match="no space left"):
            native.load()
        assert not list((tmp_path / "vitrine").iterdir()), "half a library was left behind"
    finally:
        native.load.cache_clear()


def test_the_chosen_padding_is_the_cheapest_that_holds() -> None:
    """What plain torch needs is the machine's affair; packed and compiled never needs more."""
    model = random_model(TINY_NATIVE)
    plain = choose_padding(model)
    assert plain in PADDINGS
    assert optimise(model) == []
    served = choose_padding(model)
    assert served in PADDINGS[: PADDINGS.index(plain) + 1]


@pytest.mark.parametrize(
    ("padding", "rows", "padded"),
    [
        (RowPadding(), 3, 3),
        (RowPadding(minimum=2), 1, 2),
        (RowPadding(minimum=2), 3, 3),
        (RowPadding(multiple=4), 1, 4),
        (RowPadding(multiple=4), 8, 8),
    ],
)
def test_padding_arithmetic(padding: RowPadding, rows: int, padded: int) -> None:
    assert padding.padded(rows) == padded
