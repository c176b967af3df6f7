"""The compiled forward against its PyTorch twin, and what happens without a compiler."""

from __future__ import annotations

import copy
import dataclasses
import platform
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.backends.cpu import CpuBackend
from model.batch import ForwardBatch, single_sequence
from model.compiled import CompiledForward
from model.config import ModelConfig
from model.cpu import PADDINGS, RowPadding, choose_padding
from model.forward import EagerForward, Forward
from model.kernels import native
from model.kernels.packing import WeightKind, pack
from model.kv_cache import KVCache
from model.linear import Linear
from model.select import WeightsUnavailableError, select_forward
from tests.engine.engines import TINY_COMPILED, eager_forward, random_model

BOUND = {torch.float32: 5e-6, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.bfloat16]


def config(
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    window: int | None = None,
    mlp: Literal["gelu", "gelu_tanh", "swiglu"] = "swiglu",
    *,
    qk_norm: bool = False,
    rotary: bool = True,
    biases: bool = False,
    layernorm: bool = False,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=50,  # no multiple of 16
        hidden_size=32,
        num_layers=2,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        intermediate_size=48,
        max_positions=256,
        sliding_windows=(window, None),
        qk_norm=qk_norm,
        position="rotary" if rotary else "learned",
        qkv_bias=biases,
        attention_out_bias=biases,
        mlp_bias=biases,
        norm="layernorm" if layernorm else "rmsnorm",
        mlp=mlp,
    )


CONFIGS = st.builds(
    config,
    heads=st.sampled_from([(4, 4), (4, 2), (9, 3), (6, 1)]),
    head_dim=st.sampled_from([16, 32, 48, 64, 128, 256]),
    window=st.sampled_from([None, 1, 20, 64]),
    mlp=st.sampled_from(["gelu", "gelu_tanh", "swiglu"]),
    qk_norm=st.booleans(),
    rotary=st.booleans(),
    biases=st.booleans(),
    layernorm=st.booleans(),
)


def feed(
    forward: Forward, ids: list[int], table: list[int], block_size: int, cuts: list[int]
) -> Tensor:
    """Every token's logits, the sequence cut at `cuts`."""
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        batch = single_sequence(
            ids[start:end], start=start, block_table=table, block_size=block_size
        )
        parts.append(forward(batch).clone())
    return torch.cat(parts)


@given(
    shape=CONFIGS,
    block_size=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.integers(1, 150),
    seed=st.integers(0, 1000),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
@torch.inference_mode()
def test_equals_its_twin_and_cuts_change_no_bit(
    shape: ModelConfig,
    block_size: int,
    dtype: torch.dtype,
    num_tokens: int,
    seed: int,
    data: st.DataObject,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = random_model(shape, seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.mul_(0.5)
    model = model.to(dtype)
    num_blocks = -(-num_tokens // block_size)
    table = torch.randperm(num_blocks, generator=generator).tolist()
    ids = torch.randint(shape.vocab_size, (num_tokens,), generator=generator).tolist()

    def cache() -> KVCache:
        return KVCache.allocate(shape, num_blocks=num_blocks, block_size=block_size, dtype=dtype)

    ours, twins = cache(), cache()
    twin = feed(eager_forward(model, twins), ids, table, block_size, [])
    whole = feed(CompiledForward(model, ours), ids, table, block_size, [])
    bound = BOUND[dtype] * (1 + float(twin.abs().max()))
    assert (whole - twin).abs().max() <= bound
    assert (ours.keys.float() - twins.keys.float()).abs().max() <= bound * 4
    assert (ours.values.float() - twins.values.float()).abs().max() <= bound * 4

    cuts = sorted(data.draw(st.sets(st.integers(1, num_tokens - 1)))) if num_tokens > 1 else []
    again = feed(CompiledForward(model, cache()), ids, table, block_size, cuts)
    assert torch.equal(again, whole)


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    cached=st.integers(0, 40),
    window=st.sampled_from([None, 20]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
@torch.inference_mode()
def test_rows_that_nobody_wants_are_left_out_and_change_no_bit(
    lengths: list[int], cached: int, window: int | None, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Behind the last layer's attention only the wanted rows go on: of some sequences none, of
    others a few, in any order. Keys and values are everybody's."""
    shape = dataclasses.replace(config(), sliding_windows=(None, window))
    model = random_model(shape).to(dtype)
    starts = [0, *accumulate(lengths)]
    contexts = [cached + length for length in lengths]
    width = -(-max(contexts) // 16)
    tables = torch.arange(len(lengths) * width).view(-1, width)
    positions = torch.cat([torch.arange(cached, context) for context in contexts])
    seqs = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    generator = torch.Generator().manual_seed(len(positions))
    every_row = ForwardBatch(
        input_ids=torch.randint(shape.vocab_size, (starts[-1],), generator=generator),
        positions=positions,
        query_start=torch.tensor(starts),
        context_lens=torch.tensor(contexts),
        block_tables=tables,
        slot_mapping=tables[seqs, positions // 16] * 16 + positions % 16,
        logits_rows=torch.arange(starts[-1]),
        query_start_host=tuple(starts),
        context_lens_host=tuple(contexts),
    )
    wanted = data.draw(st.lists(st.integers(0, starts[-1] - 1), unique=True))
    some_rows = dataclasses.replace(every_row, logits_rows=torch.tensor(wanted, dtype=torch.int64))

    def run(batch: ForwardBatch) -> tuple[Tensor, KVCache]:
        cache = KVCache.allocate(shape, num_blocks=tables.numel(), block_size=16, dtype=dtype)
        for half in (cache.keys, cache.values):  # what stands before this step's tokens
            half.normal_(generator=torch.Generator().manual_seed(7))
        return CompiledForward(copy.deepcopy(model), cache)(batch).clone(), cache

    (every_logit, every_cache), (some_logits, some_cache) = run(every_row), run(some_rows)
    assert torch.equal(some_logits, every_logit[wanted])
    assert torch.equal(some_cache.keys, every_cache.keys)
    assert torch.equal(some_cache.values, every_cache.values)


@torch.inference_mode()
def test_other_calls_of_the_model_run_on_the_weights_that_serve() -> None:
    """What explains an answer must not need a second copy of the model."""
    model = random_model(TINY_COMPILED)
    plain = copy.deepcopy(model)

    def eager_logits(of: torch.nn.Module) -> Tensor:
        cache = KVCache.allocate(TINY_COMPILED, num_blocks=1, block_size=16, dtype=torch.float32)
        forward = EagerForward(of, CpuBackend(TINY_COMPILED, cache))  # type: ignore[arg-type]
        return feed(forward, [1, 2, 3], [0], 16, [])

    cache = KVCache.allocate(TINY_COMPILED, num_blocks=1, block_size=16, dtype=torch.float32)
    CompiledForward(model, cache)
    held = sum(parameter.nbytes for parameter in model.blocks.parameters())
    assert held < sum(parameter.nbytes for parameter in plain.blocks.parameters()) / 4
    assert (eager_logits(model) - eager_logits(plain)).abs().max() <= 1e-4


@torch.inference_mode()
def test_int8_weights_are_within_half_a_step_of_the_given_ones() -> None:
    """And the forward computes with exactly those: its twin on the rounded weights agrees."""
    linear = Linear(64, 40, bias=False)
    linear.weight.normal_()
    packed = pack(linear, "int8")
    assert packed.scale is not None
    rounded = packed.unpacked().float()
    half_step = packed.scale[:40, None] / 2
    # bfloat16 rounds the rounded weight, which may be larger than the given one by half a step.
    bound = half_step + (linear.weight.abs() + half_step) * 2**-8
    assert ((rounded - linear.weight).abs() <= bound).all()

    model = random_model(TINY_COMPILED).to(torch.bfloat16)

    def cache() -> KVCache:
        return KVCache.allocate(TINY_COMPILED, num_blocks=4, block_size=16, dtype=torch.bfloat16)

    ids = list(range(50))
    ours = feed(CompiledForward(model, cache(), int8=True), ids, [2, 0, 1, 3], 16, [])
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight, module.replaced = torch.nn.Parameter(module.plain_weight()), None
    twin = feed(eager_forward(model, cache()), ids, [2, 0, 1, 3], 16, [])
    assert (ours - twin).abs().max() <= BOUND[torch.bfloat16] * (1 + float(twin.abs().max()))


@given(
    kind=st.sampled_from(["float32", "bfloat16"]),
    in_features=st.integers(1, 40).map(lambda n: 2 * n),
    out_features=st.integers(1, 100),
    gated=st.booleans(),
)
@settings(deadline=None)
@torch.inference_mode()
def test_unpacking_gives_the_weight_back(
    kind: WeightKind, in_features: int, out_features: int, gated: bool
) -> None:
    out_features = out_features * 32 if gated else out_features
    linear = Linear(in_features, out_features, bias=True).to(getattr(torch, kind))
    assert torch.equal(pack(linear, kind, gated=gated).unpacked(), linear.weight)


@given(
    kind=st.sampled_from(["float32", "bfloat16", "int8"]),
    rows=st.integers(1, 40),
    in_features=st.integers(1, 40).map(lambda n: 2 * n),
    out_features=st.integers(1, 100),
    gated=st.booleans(),
    bias=st.booleans(),
)
@settings(deadline=None)
@torch.inference_mode()
def test_a_packed_product_is_that_of_the_unpacked_weight(
    kind: WeightKind, rows: int, in_features: int, out_features: int, gated: bool, bias: bool
) -> None:
    out_features = out_features * 32 if gated else out_features
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    linear = Linear(in_features, out_features, bias=bias).to(dtype)
    if linear.bias is not None:
        linear.bias.normal_()
    x = torch.randn(rows, in_features).to(dtype)
    packed = pack(linear, kind, gated=gated)
    expected = x.float() @ packed.unpacked().float().T
    if linear.bias is not None:
        expected += linear.bias.float()
    # int8 is scaled after the product, and unpacked to bfloat16 before it
    bound = 1e-5 if kind != "int8" else 2**-8 * float(expected.abs().max() + in_features**0.5)
    assert (packed.product(x) - expected).abs().max() <= bound
    with pytest.raises(TypeError, match="takes"):
        packed.product(x.double())


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_nan_reaches_its_own_output_and_no_other(dtype: torch.dtype) -> None:
    """The sampler must see it: a kernel that hid it would serve noise as text. And the next
    owner of its block must not."""
    shape = config(mlp="gelu_tanh", layernorm=True)
    model = random_model(shape).to(dtype)
    model.embedding.weight[7] = float("nan")
    cache = KVCache.allocate(shape, num_blocks=1, block_size=16, dtype=dtype)
    forward = CompiledForward(model, cache)
    clean = feed(forward, [1, 2], [0], 16, [])
    poisoned = feed(forward, [1, 2, 7, 3], [0], 16, [1, 2, 3])
    assert torch.equal(poisoned[:2], clean)
    assert poisoned[2:].isnan().all()
    assert torch.equal(feed(forward, [1, 2], [0], 16, []), clean)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other names for lesser processors")
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64-v4"])
def test_lesser_processors_pass_the_same_tests(march: str, tmp_path: Path) -> None:
    if march == "x86-64-v4" and " avx512f " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512; x86-64-v3 runs everywhere")
    command = [sys.executable, "-m", "tests.model.portable_kernels", march, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:]
    assert list((tmp_path / "vitrine").glob("*.so")), "another library was tested"


@pytest.mark.slow
@torch.inference_mode()
def test_a_long_forward_shows_that_it_gets_on() -> None:
    """A step that takes longer than the supervisor's patience must not look like a stall."""
    shape = dataclasses.replace(
        config(),
        hidden_size=512,
        intermediate_size=2048,
        max_positions=2048,
        num_layers=16,
        sliding_windows=(),
    )
    cache = KVCache.allocate(shape, num_blocks=64, block_size=32, dtype=torch.float32)
    forward = CompiledForward(random_model(shape), cache)
    batch = single_sequence([1] * 2048, block_table=list(range(64)), block_size=32)
    beats: list[float] = []
    began = time.monotonic()
    forward(batch, lambda: beats.append(time.monotonic()))
    assert time.monotonic() - began > 0.4, "make it longer"
    assert beats


@pytest.mark.parametrize("mlp", ["gelu", "gelu_tanh", "swiglu"])
@torch.inference_mode()
def test_activations_at_the_ends_of_the_range(mlp: Literal["gelu", "gelu_tanh", "swiglu"]) -> None:
    """No overflow and no NaN however large what goes in."""
    shape = config(mlp=mlp)
    for size in (1.0, 1e3, 1e8):
        model = random_model(shape)
        block = model.blocks[0]
        up = block.mlp.gate_up if mlp == "swiglu" else block.mlp.up  # type: ignore[union-attr]
        up.weight.mul_(size)  # type: ignore[operator]
        caches = [
            KVCache.allocate(shape, num_blocks=1, block_size=16, dtype=torch.float32)
            for _ in range(2)
        ]
        twin = feed(eager_forward(model, caches[0]), [1, 2, 3], [0], 16, [])
        ours = feed(CompiledForward(model, caches[1]), [1, 2, 3], [0], 16, [])
        assert torch.isfinite(ours).all()
        assert torch.allclose(ours, twin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "block_size", "dtype", "reason"),
    [
        ({"head_dim": 24}, 32, torch.float32, "head_dim 24"),
        ({"head_dim": 272}, 32, torch.float32, "head_dim 272 is over 256"),
        ({"hidden_size": 40}, 32, torch.float32, "hidden_size 40"),
        ({"intermediate_size": 50}, 32, torch.float32, "intermediate_size 50"),
        ({}, 8, torch.float32, "block_size 8"),
        ({}, 144, torch.float32, "block_size 144 is over 128"),
        ({}, 32, torch.float16, "float16"),
    ],
)
def test_what_compiled_code_cannot_do_runs_in_torch_and_says_why(
    change: dict[str, int], block_size: int, dtype: torch.dtype, reason: str
) -> None:
    shape = dataclasses.replace(config(), **change)  # type: ignore[arg-type]
    cache = KVCache.allocate(shape, num_blocks=1, block_size=block_size, dtype=dtype)
    model = random_model(shape).to(dtype)
    with pytest.raises(WeightsUnavailableError, match=reason):
        select_forward(model, cache, deterministic=False, weights="int8")
    selection = select_forward(model, cache, deterministic=False)
    assert selection.name == "cpu-torch"
    assert reason in selection.misses[0]


def test_without_a_compiler_torch_serves_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "PREBUILT", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native.load.cache_clear()
    try:
        cache = KVCache.allocate(TINY_COMPILED, num_blocks=1, block_size=16, dtype=torch.float32)
        selection = select_forward(random_model(TINY_COMPILED), cache, deterministic=True)
        assert selection.name == "cpu-torch"
        assert selection.padding in (*PADDINGS, None)
        assert "no C compiler" in selection.misses[0]
    finally:
        native.load.cache_clear()


def test_a_compiler_that_fails_is_reported_with_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "PREBUILT", tmp_path / "none")
    monkeypatch.setenv("CC", str(compiler))
    native.load.cache_clear()
    try:
        with pytest.raises(native.NativeKernelError, match="no space left"):
            native.load()
        assert not list((tmp_path / "vitrine").iterdir()), "half a library was left behind"
    finally:
        native.load.cache_clear()


def test_the_chosen_padding_is_one_of_those() -> None:
    """What plain torch needs is the machine's affair."""
    assert choose_padding(random_model(TINY_COMPILED)) in (*PADDINGS, None)


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
