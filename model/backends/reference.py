"""The equation over pages, one sequence at a time: the oracle of every test.

Slow and plain. It can also keep the attention weights, which the fast backends never form.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from model.attention import SelfAttention, causal_mask, scaled_dot_product
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.positions import RotaryPositions


@dataclass(frozen=True, slots=True)
class ReferenceBackend:
    """softmax(Q K^T / sqrt(d_k)) V, written out.

    With a `recorder` list, every layer of every sequence appends its weights to it:
    (num_heads, num_queries, num_keys), rows summing to 1.
    """

    config: ModelConfig
    cache: KVCache
    recorder: list[Float[Tensor, "num_heads num_queries num_keys"]] | None = None

    def begin(self, batch: ForwardBatch) -> _ReferenceStep:
        return _ReferenceStep(self, batch)


@dataclass(frozen=True, slots=True)
class _ReferenceStep:
    backend: ReferenceBackend
    batch: ForwardBatch

    def __call__(
        self,
        attention: SelfAttention,
        qkv: Float[Tensor, "num_tokens qkv_size"],
        rotary: RotaryPositions | None,
    ) -> Float[Tensor, "num_tokens query_size"]:
        queries, keys, values = attention.heads(qkv, rotary)
        layer = attention.layer
        batch, cache, config = self.batch, self.backend.cache, self.backend.config
        real = batch.query_start_host[-1]
        slots = batch.slot_mapping[:real]
        cache.write(
            layer,
            keys[:real],
            values[:real],
            slots // cache.block_size,
            slots % cache.block_size,
        )
        out = queries.new_zeros(queries.shape)
        group = config.num_heads // config.num_kv_heads
        for i in range(batch.num_seqs):
            rows = slice(batch.query_start_host[i], batch.query_start_host[i + 1])
            num_keys = batch.context_lens_host[i]
            table = batch.block_tables[i, : -(-num_keys // cache.block_size)]
            # (blocks, kv_heads, block_size, d) -> (kv_heads, num_keys, d), one copy a query head
            k, v = (
                pages.transpose(0, 1)
                .flatten(1, 2)[:, :num_keys]
                .float()
                .repeat_interleave(group, dim=0)
                for pages in (
                    cache.keys[layer][table].transpose(2, 3),
                    cache.values[layer][table],
                )
            )
            q = queries[rows].transpose(0, 1).float()
            visible = causal_mask(q.shape[1], num_keys, config.window(layer)).to(q.device)
            mixed, weights = scaled_dot_product(q, k, v, visible)
            if self.backend.recorder is not None:
                self.backend.recorder.append(weights)
            out[rows] = mixed.transpose(0, 1).to(out.dtype)
        return out.flatten(1)
