"""The one call every attention backend answers."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from model.batch import ForwardBatch


class AttentionStep(Protocol):
    """Attention for one forward: knows the step's batch and the cache.

    Called once a layer. Writes the new keys and values into the cache, then lets every
    query see its own sequence's positions up to and including itself.
    """

    def __call__(
        self,
        layer: int,
        queries: Float[Tensor, "num_tokens num_heads head_dim"],
        keys: Float[Tensor, "num_tokens num_kv_heads head_dim"],
        values: Float[Tensor, "num_tokens num_kv_heads head_dim"],
    ) -> Float[Tensor, "num_tokens num_heads head_dim"]: ...


class AttentionBackend(Protocol):
    """Makes an `AttentionStep` for a batch: per-step work that all layers share."""

    def begin(self, batch: ForwardBatch) -> AttentionStep: ...
