"""Recordings for tests."""

from __future__ import annotations

import torch

from model.explain.record import complete, record
from model.explain.recording import NONE, Ablation, Recording
from model.transformer import Transformer


def recorded(model: Transformer, ids: list[int], ablate: Ablation = NONE) -> Recording:
    """Everything about `ids`."""
    return complete(record(model, torch.tensor(ids), ablate=ablate))
