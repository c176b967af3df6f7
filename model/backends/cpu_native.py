"""Attention over pages on the CPU through the compiled kernel: the serving backend.

One call a layer writes the new keys and values and attends, reading every block once where
it lies. What it computes, and that its bits do not depend on company, is told in
model/kernels/cpu_kernels.c; `CpuBackend` is its PyTorch twin.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.attention import SelfAttention
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kernels import native
from model.kernels.native import LANES, NativeKernels
from model.kv_cache import KVCache
from model.positions import RotaryPositions

MAX_HEAD_DIM = 256
MAX_BLOCK_SIZE = 128
JOB_QUERIES = 32  # queries of a chunk that one thread takes at a time


def unsupported(config: ModelConfig, cache: KVCache) -> str | None:
    """Why the kernel cannot serve this model, or None when it can."""
    if config.head_dim % LANES or config.head_dim > MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is not a multiple of {LANES} up to {MAX_HEAD_DIM}"
    if cache.block_size % LANES or cache.block_size > MAX_BLOCK_SIZE:
        return f"block_size {cache.block_size} is not a multiple of {LANES} up to {MAX_BLOCK_SIZE}"
    if cache.keys.dtype not in (torch.float32, torch.bfloat16):
        return f"a {cache.keys.dtype} cache; float32 and bfloat16 are"
    return None


@dataclass(frozen=True, slots=True)
class NativeCpuBackend:
    """The compiled kernel over this cache. Raises `NativeKernelError` if it cannot be built."""

    config: ModelConfig
    cache: KVCache
    kernels: NativeKernels

    @classmethod
    def create(cls, config: ModelConfig, cache: KVCache) -> NativeCpuBackend:
        return cls(config, cache, native.load())

    def begin(self, batch: ForwardBatch) -> _NativeStep:
        starts = batch.query_start_host
        jobs = [
            (seq, row, min(JOB_QUERIES, starts[seq + 1] - row))
            for seq in range(batch.num_seqs)
            for row in range(starts[seq], starts[seq + 1], JOB_QUERIES)
        ]
        return _NativeStep(
            self, batch, torch.tensor(jobs, dtype=torch.int64), batch.block_tables.contiguous()
        )


@dataclass(frozen=True, slots=True)
class _NativeStep:
    backend: NativeCpuBackend
    batch: ForwardBatch
    jobs: Int[Tensor, "num_jobs 3"]
    tables: Int[Tensor, "num_seqs max_blocks"]

    def __call__(
        self,
        attention: SelfAttention,
        qkv: Float[Tensor, "num_tokens qkv_size"],
        rotary: RotaryPositions | None,
    ) -> Float[Tensor, "num_tokens query_size"]:
        config, cache, batch = self.backend.config, self.backend.cache, self.batch
        real = batch.query_start_host[-1]
        out = torch.empty(qkv.shape[0], config.query_size, dtype=qkv.dtype)
        out[real:] = 0
        shape = native.Shape(
            num_seqs=batch.num_seqs,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=cache.block_size,
            max_blocks=self.tables.shape[1],
            window=config.window(attention.layer) or 0,
            is_bf16=int(qkv.dtype == torch.bfloat16),
            qkv_stride=qkv.stride(0),
            scale=1 / math.sqrt(config.head_dim),
            norm_eps=config.norm_eps,
        )
        if attention.query_norm is not None and attention.key_norm is not None:
            shape.query_norm = attention.query_norm.weight.data_ptr()
            shape.key_norm = attention.key_norm.weight.data_ptr()
        if rotary is not None:
            shape.cos = rotary.cos_table.data_ptr()
            shape.sin = rotary.sin_table.data_ptr()
            shape.positions = rotary.positions.data_ptr()
        self.backend.kernels.library.vitrine_attention(
            ctypes.byref(shape),
            qkv.data_ptr(),
            cache.keys[attention.layer].data_ptr(),
            cache.values[attention.layer].data_ptr(),
            batch.slot_mapping.data_ptr(),
            real,
            self.jobs.data_ptr(),
            self.jobs.shape[0],
            batch.query_start.data_ptr(),
            batch.context_lens.data_ptr(),
            self.tables.data_ptr(),
            out.data_ptr(),
        )
        return out
