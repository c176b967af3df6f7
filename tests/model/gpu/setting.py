"""Where the kernels are tested: on a GPU if there is one, else in Triton's interpreter; and the
pages of a few sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import KVCache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of results of order 1. On a GPU, exp and the products' order of additions differ from torch's.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Within the tolerance of their dtype."""
    return torch.allclose(
        ours.float(), theirs.float(), rtol=TOLERANCE[ours.dtype], atol=TOLERANCE[ours.dtype]
    )


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@dataclass(frozen=True)
class Pages:
    """A layer's cache filled with noise, and sequences whose blocks lie in it in disorder."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    context_lens: Tensor

    @classmethod
    def of(
        cls,
        context_lens: list[int],
        *,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Pages:
        blocks = [-(-length // block_size) for length in context_lens]
        config = replace(SHAPE, num_heads=num_kv_heads, num_kv_heads=num_kv_heads)
        cache = KVCache.allocate(
            replace(config, head_dim=head_dim),
            num_blocks=sum(blocks) + 1,
            block_size=block_size,
            dtype=dtype,
            device=DEVICE,
            by_token=True,
        )
        cache.keys.copy_(normal(*cache.keys.shape, seed=seed, dtype=dtype))
        cache.values.copy_(normal(*cache.values.shape, seed=seed + 1, dtype=dtype))
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(seed)) + 1
        tables = torch.zeros(len(blocks), max(blocks) + 1, dtype=torch.int32)
        for row, own in zip(tables, order.split(blocks), strict=True):
            row[: len(own)] = own
        return cls(cache.keys[0], cache.values[0], tables.to(DEVICE), int32(context_lens))


SHAPE = ModelConfig(
    vocab_size=8,
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=8,
    max_positions=4096,
)
