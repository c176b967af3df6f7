"""The kernels of a layer outside attention, against their twins."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.kernels.gpu.embed import embed, embed_twin
from model.kernels.gpu.gate import silu_mul, silu_mul_twin
from model.kernels.gpu.norm import add_norm, add_norm_twin
from model.kernels.gpu.product import fixed_product, fixed_product_twin
from model.kernels.gpu.rotary import rotary_write, rotary_write_twin
from model.kv_cache import KVCache
from model.positions import rotary_table
from tests.model.gpu.setting import DEVICE, close, int32, normal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [48, 768])
@pytest.mark.parametrize("is_layernorm", [False, True])
@pytest.mark.parametrize("has_update", [False, True])
def test_add_norm(dtype: torch.dtype, size: int, is_layernorm: bool, has_update: bool) -> None:
    ours, theirs = (normal(5, size, dtype=dtype) * 3 + 1 for _ in range(2))
    update = normal(5, size, dtype=dtype, seed=1) if has_update else None
    weight = normal(size, dtype=dtype, seed=2)
    bias = normal(size, dtype=dtype, seed=3) if is_layernorm else None
    normed = add_norm(ours, update, weight, bias, 1e-5)
    assert close(normed, add_norm_twin(theirs, update, weight, bias, 1e-5))
    # The interpreter cuts to bfloat16 where a GPU rounds.
    is_exact = dtype != torch.bfloat16 or DEVICE.type == "cuda"
    assert torch.equal(ours, theirs) if is_exact else close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = normal(3, 2 * 1100, dtype=dtype) * 5
    assert close(silu_mul(gate_up), silu_mul_twin(gate_up))


@pytest.mark.parametrize("has_positions", [False, True])
def test_embed(has_positions: bool) -> None:
    """Ids, and references to what was drawn for a seat."""
    table = normal(40, 48)
    places = normal(64, 48, seed=1) if has_positions else None
    ids, positions = int32([3, -1, 39, -4, 0]), int32([0, 63, 7, 7, 1])
    last_tokens = int32([11, 12, 13, 39])
    arguments = (ids, positions, last_tokens, table, places)
    assert torch.equal(embed(*arguments), embed_twin(*arguments))
    expected = table[torch.tensor([3, 11, 39, 39, 0], device=DEVICE)]
    if places is not None:
        expected = expected + places[positions.long()]
    assert torch.equal(embed(*arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("has_rotary", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 20), (9, 3, 16)])
def test_rotary_write(
    dtype: torch.dtype, has_norm: bool, has_rotary: bool, heads: int, kv_heads: int, dim: int
) -> None:
    """Queries, and every number of the cache: a token with slot -1 is written nowhere."""
    config = ModelConfig(8, 8, 1, heads, kv_heads, dim, 8, 64)
    qkv = normal(4, (heads + 2 * kv_heads) * dim, dtype=dtype)
    norms = (normal(dim, dtype=dtype, seed=1), normal(dim, dtype=dtype, seed=2), 1e-6)
    tables = tuple(table.to(DEVICE) for table in rotary_table(config, 64))
    caches, queries = [], []
    for run in (rotary_write, rotary_write_twin):
        cache = KVCache.allocate(
            config, num_blocks=3, block_size=8, dtype=dtype, device=DEVICE, by_token=True
        )
        queries.append(
            run(
                qkv,
                norms if has_norm else None,
                tables if has_rotary else None,
                int32([0, 5, 63, 7]),
                int32([23, 0, -1, 9]),
                cache.keys[0],
                cache.values[0],
            )
        )
        caches.append(cache)
    assert close(queries[0], queries[1])
    assert close(caches[0].keys, caches[1].keys)
    assert torch.equal(caches[0].values, caches[1].values)
    assert caches[0].values.count_nonzero() == 3 * kv_heads * dim


def test_the_layout_of_the_cpu_is_refused() -> None:
    config = ModelConfig(8, 8, 1, 1, 1, 16, 8, 64)
    cache = KVCache.allocate(
        config, num_blocks=1, block_size=8, dtype=torch.float32, by_token=False
    )
    with pytest.raises(ValueError, match="keys by token"):
        rotary_write(
            normal(1, 48), None, None, int32([0]), int32([0]), cache.keys[0], cache.values[0]
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 48, 80), (65, 130, 64), (9, 7, 33)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_fixed_product(
    dtype: torch.dtype, rows: int, outputs: int, inputs: int, has_bias: bool
) -> None:
    x, weight = normal(rows, inputs, dtype=dtype), normal(outputs, inputs, dtype=dtype, seed=1)
    weight *= inputs**-0.5
    bias = normal(outputs, dtype=dtype, seed=2) if has_bias else None
    assert close(fixed_product(x, weight, bias), fixed_product_twin(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_product_gives_a_row_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    x, weight = normal(150, 96, dtype=dtype), normal(70, 96, dtype=dtype, seed=1)
    together = fixed_product(x, weight, None)
    for count in (1, 2, 3, 17, 64, 65):
        assert torch.equal(fixed_product(x[20 : 20 + count].clone(), weight, None),
                           together[20 : 20 + count])  # fmt: skip
