"""One step of the model, from a batch to the logits that are wanted: what an engine runs.

`EagerForward` is the transformer in PyTorch over an attention backend; `CompiledForward`
(model/compiled.py) is the same in one call of compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from model.attention import SelfAttention
from model.backends.base import AttentionBackend, AttentionStep
from model.batch import ForwardBatch
from model.explain.attended import Watching, find
from model.positions import RotaryPositions
from model.transformer import Transformer

Heartbeat = Callable[[], None]


class Forward(Protocol):
    """Runs a batch through the model, and fills its `watch` if it has one."""

    def __call__(
        self, batch: ForwardBatch, heartbeat: Heartbeat | None = None
    ) -> Float[Tensor, "num_logits vocab_size"]:
        """float32 scores of every next token for the batch's `logits_rows`; the cache has the
        batch's keys and values afterwards. The tensor is good until the next call.

        `heartbeat` is called between layers, from this thread: a long step shows that it gets
        on, a hanging one that it does not."""
        ...


@dataclass(frozen=True, slots=True)
class EagerForward:
    """The transformer, layer by layer, in PyTorch."""

    model: Transformer
    backend: AttentionBackend

    def __call__(
        self, batch: ForwardBatch, heartbeat: Heartbeat | None = None
    ) -> Float[Tensor, "num_logits vocab_size"]:
        attend = self.backend.begin(batch)
        if batch.watch is not None:
            attend = Watching(attend, self.backend.cache, batch, batch.watch)
        if heartbeat is not None:
            attend = _beating(attend, heartbeat)
        hidden = self.model(batch.input_ids, batch.positions, attend)
        logits = torch.empty(0, self.model.config.vocab_size)
        if batch.logits_rows.shape[0]:  # the first part of a prompt has none
            logits = self.model.logits(hidden[batch.logits_rows])
        if batch.watch is not None:
            find(self.model.config, batch, batch.watch, logits)
        return logits


def _beating(attend: AttentionStep, heartbeat: Heartbeat) -> AttentionStep:
    """The same attention, and a sign of life after each layer's."""

    def attend_and_tell(
        attention: SelfAttention, qkv: Tensor, rotary: RotaryPositions | None
    ) -> Tensor:
        gathered = attend(attention, qkv, rotary)
        heartbeat()
        return gathered

    return attend_and_tell
