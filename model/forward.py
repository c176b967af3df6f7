"""One step of the model, from a batch to the logits that are wanted: what an engine runs.

`EagerForward` is the transformer in PyTorch over an attention backend; `CompiledForward`
(model/compiled.py) is the same in one call of compiled code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from model.backends.base import AttentionBackend
from model.batch import ForwardBatch
from model.transformer import Transformer


class Forward(Protocol):
    """Runs a batch through the model."""

    def __call__(self, batch: ForwardBatch) -> Float[Tensor, "num_logits vocab_size"]:
        """float32 scores of every next token for the batch's `logits_rows`; the cache has the
        batch's keys and values afterwards. The tensor is good until the next call."""
        ...


@dataclass(frozen=True, slots=True)
class EagerForward:
    """The transformer, layer by layer, in PyTorch."""

    model: Transformer
    backend: AttentionBackend

    def __call__(self, batch: ForwardBatch) -> Float[Tensor, "num_logits vocab_size"]:
        attend = self.backend.begin(batch)
        hidden = self.model(batch.input_ids, batch.positions, attend)
        if not batch.logits_rows.shape[0]:  # the first part of a prompt
            return hidden.new_empty(0, self.model.config.vocab_size, dtype=torch.float32)
        return self.model.logits(hidden[batch.logits_rows])
