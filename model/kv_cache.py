"""The paged KV tensors and their byte arithmetic; no policy.

Keys and values of all layers live in two tensors of blocks. Which block belongs to which
sequence is decided in `service/engine/blocks.py`; here a block is only a number.

One head's part of a block is a ready operand of each product: K^T, (head_dim, block_size),
for Q K^T, and V, (block_size, head_dim), for the weighted sum. On a GPU keys lie token after
token too (`by_token`), under the same shape: model/kernels/gpu/rotary.py says why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.config import ModelConfig


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of all layers that one block holds."""
    return 2 * config.num_layers * config.kv_size * block_size * dtype.itemsize


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, in blocks."""

    keys: Float[Tensor, "num_layers num_blocks num_kv_heads head_dim block_size"]
    values: Float[Tensor, "num_layers num_blocks num_kv_heads block_size head_dim"]

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        by_token: bool | None = None,
    ) -> KVCache:
        """Zeroed blocks. Zero matters: a masked position contributes 0 * value, and
        0 * NaN would not be 0. `by_token` is how keys lie in memory; None: as the device's
        kernels want them."""
        pages = (config.num_layers, num_blocks, config.num_kv_heads)
        values = torch.zeros(*pages, block_size, config.head_dim, dtype=dtype, device=device)
        if by_token if by_token is not None else values.device.type == "cuda":
            return cls(torch.zeros_like(values).transpose(-2, -1), values)
        keys = torch.zeros(*pages, config.head_dim, block_size, dtype=dtype, device=device)
        return cls(keys, values)

    @property
    def num_blocks(self) -> int:
        return int(self.keys.shape[1])

    @property
    def block_size(self) -> int:
        return int(self.values.shape[3])

    def clear(self, blocks: list[int]) -> None:
        """Zero these blocks, as `allocate` gave them."""
        self.keys[:, blocks] = 0
        self.values[:, blocks] = 0

    def write(
        self,
        layer: int,
        keys: Float[Tensor, "num_tokens num_kv_heads head_dim"],
        values: Float[Tensor, "num_tokens num_kv_heads head_dim"],
        blocks: Int[Tensor, " num_tokens"],
        offsets: Int[Tensor, " num_tokens"],
    ) -> None:
        """Put one key and value a token at (blocks[i], offsets[i]) of `layer`."""
        self.keys[layer][blocks, :, :, offsets] = keys.to(self.keys.dtype)
        self.values[layer][blocks, :, offsets] = values.to(self.values.dtype)
