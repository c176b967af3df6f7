"""Recordings for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.batch import Watch
from model.explain.record import complete, record
from model.explain.recording import NONE, Ablation, Recording
from model.transformer import Transformer


def recorded(model: Transformer, ids: list[int], ablate: Ablation = NONE) -> Recording:
    """Everything about `ids`."""
    return complete(record(model, torch.tensor(ids), ablate=ablate))


@dataclass(frozen=True)
class Glance:
    """Where a query looked most, strongest first."""

    positions: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Glances:
    """What a watch found for one row."""

    mean: Glance
    heads: list[Glance]
    next: list[tuple[int, float]]


def glances(watch: Watch) -> list[Glances]:
    """What a watch found, row by row."""
    found: list[Glances] = []
    begin = 0
    for row in range(len(watch.seqs)):
        end = begin + 1 + sum(of_row == row for of_row, _, _ in watch.heads)
        mean, *heads = (_glance(watch, i) for i in range(begin, end))
        pairs = zip(watch.tokens[row].tolist(), watch.logprobs[row].tolist(), strict=True)
        found.append(Glances(mean, heads, [pair for pair in pairs if pair[0] >= 0]))
        begin = end
    return found


def _glance(watch: Watch, row: int) -> Glance:
    num = int((watch.places[row] >= 0).sum())
    assert (watch.places[row, num:] == -1).all()
    return Glance(watch.places[row, :num].tolist(), watch.weights[row, :num].tolist())
