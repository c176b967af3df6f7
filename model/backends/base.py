"""The one call every attention backend answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from jaxtyping import Float
from torch import Tensor

from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.positions import RotaryPositions

if TYPE_CHECKING:
    from model.attention import SelfAttention


class AttentionStep(Protocol):
    """Attention for one forward: knows the step's batch and the cache.

    Called once a layer with that layer's `[queries | keys | values]` product. Applies
    query/key norm and rotary positions, writes the new keys and values into the cache, and
    lets every query see its own sequence's positions up to and including itself. A backend
    may do all of this in one kernel; `SelfAttention.heads` is the plain way to begin.
    """

    def __call__(
        self,
        attention: SelfAttention,
        qkv: Float[Tensor, "num_tokens qkv_size"],
        rotary: RotaryPositions | None,
    ) -> Float[Tensor, "num_tokens query_size"]: ...


class AttentionBackend(Protocol):
    """Attention over a cache. Makes an `AttentionStep` for a batch: per-step work that all layers
    share."""

    @property
    def cache(self) -> KVCache: ...

    def begin(self, batch: ForwardBatch) -> AttentionStep: ...
