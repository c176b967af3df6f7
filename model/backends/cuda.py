"""Attention over pages on a GPU: Triton kernels (model/kernels/gpu/).

Single tokens go through the kernel that splits their keys over many programs, chunks through the
one that shares a tile of keys among many queries. In deterministic mode everything takes the second
way, so that a token's bits do not depend on whether it was decoded or computed again in a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from model.attention import SelfAttention
from model.batch import AttentionPlan, ForwardBatch
from model.config import ModelConfig
from model.kernels.gpu.decode import Splits
from model.kernels.gpu.kernels import TRITON, Kernels
from model.kernels.gpu.prefill import queries_per_tile
from model.kv_cache import KVCache
from model.positions import RotaryPositions

Norms = tuple[Tensor, Tensor, float]


@dataclass(frozen=True, slots=True)
class CudaBackend:
    """`max_model_len` settles where long sequences are split; `kernels` may be the twins."""

    config: ModelConfig
    cache: KVCache
    max_model_len: int
    is_deterministic: bool = False
    kernels: Kernels = TRITON

    @property
    def tile_queries(self) -> int:
        """Tokens of one sequence that a tile holds."""
        return queries_per_tile(self.config.num_heads, self.config.num_kv_heads)

    def begin(self, batch: ForwardBatch) -> CudaStep:
        plan = batch.plan or plan_attention(
            batch.query_start_host, self.tile_queries, self.is_deterministic, self.cache.keys.device
        )
        return CudaStep(self, batch, plan, Splits.of(self.max_model_len))


def tiles_of(
    query_start: tuple[int, ...], tile_queries: int, is_deterministic: bool
) -> tuple[int, list[int], list[int]]:
    """What an `AttentionPlan` holds, as numbers."""
    lengths = [end - start for start, end in pairwise(query_start)]
    num_decodes = 0
    if not is_deterministic:
        while num_decodes < len(lengths) and lengths[num_decodes] == 1:
            num_decodes += 1
    seqs, starts = [], []
    for seq in range(num_decodes, len(lengths)):
        for start in range(0, lengths[seq], tile_queries):
            seqs.append(seq)
            starts.append(start)
    return num_decodes, seqs, starts


def plan_attention(
    query_start: tuple[int, ...], tile_queries: int, is_deterministic: bool, device: torch.device
) -> AttentionPlan:
    """The plan of a batch that came without one."""
    num_decodes, seqs, starts = tiles_of(query_start, tile_queries, is_deterministic)
    return AttentionPlan(
        num_decodes,
        torch.tensor(seqs, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
    )


@dataclass(frozen=True, slots=True)
class CudaStep:
    """One step's attention; called by a module, or by the fused forward with what it needs."""

    backend: CudaBackend
    batch: ForwardBatch
    plan: AttentionPlan
    splits: Splits

    def __call__(
        self,
        attention: SelfAttention,
        qkv: Float[Tensor, "num_tokens qkv_size"],
        rotary: RotaryPositions | None,
    ) -> Float[Tensor, "num_tokens query_size"]:
        tables = None if rotary is None else (rotary.cos_table, rotary.sin_table)
        return self.attend(attention.layer, qkv, norms_of(attention), tables)

    def attend(
        self,
        layer: int,
        qkv: Float[Tensor, "num_tokens qkv_size"],
        norms: Norms | None,
        rotary_tables: tuple[Tensor, ...] | None,
    ) -> Float[Tensor, "num_tokens query_size"]:
        """Write this layer's keys and values, and gather for every token."""
        batch, backend, kernels = self.batch, self.backend, self.backend.kernels
        keys, values = backend.cache.keys[layer], backend.cache.values[layer]
        queries = kernels.rotary_write(
            qkv, norms, rotary_tables, batch.positions, batch.slot_mapping, keys, values
        )
        out = torch.empty_like(queries)
        out[batch.query_start_host[-1] :].zero_()  # rows that only pad the batch are nobody's
        window = backend.config.window(layer)
        decodes = self.plan.num_decodes
        if decodes:
            kernels.decode_attention(
                queries,
                keys,
                values,
                batch.block_tables[:decodes],
                batch.context_lens[:decodes],
                batch.query_start[:decodes],
                window,
                self.splits,
                out,
            )
        if self.plan.tile_seqs.shape[0]:
            kernels.prefill_attention(
                queries,
                keys,
                values,
                batch.block_tables,
                batch.query_start,
                batch.context_lens,
                (self.plan.tile_seqs, self.plan.tile_starts),
                window,
                out,
            )
        return out.flatten(1)


def norms_of(attention: SelfAttention) -> Norms | None:
    """(query weight, key weight, epsilon), of a model that has them."""
    if attention.query_norm is None or attention.key_norm is None:
        return None
    return attention.query_norm.weight, attention.key_norm.weight, attention.query_norm.eps
