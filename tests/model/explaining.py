"""Recordings for tests: run to the end at once."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import torch

from model.explain.record import record
from model.explain.recording import NONE, Ablation, Recording
from model.transformer import Transformer

T = TypeVar("T")


def run(pieces: Generator[object, None, T]) -> T:
    """What a generator returns at its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: T = end.value
            return result


def recorded(model: Transformer, ids: list[int], ablate: Ablation = NONE) -> Recording:
    """Everything about `ids`."""
    return run(record(model, torch.tensor(ids), ablate=ablate))
