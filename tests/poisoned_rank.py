"""A part of a model at fault: `POISON="rank 1 memory" python -m tests.poisoned_rank`.

In the middle of the forward, when other ranks wait for the next sum, rank 1 finds no memory for
steps of more than MOST tokens; with `rank 1 raise` it raises for a step that holds POISON_TOKENS.
`tests.poisoned_engine` starts such ranks, and is rank 0.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

from model.batch import ForwardBatch
from model.fused import FusedForward
from service.engine import parallel, rank
from service.engine.rank_messages import Lead

MOST = 3
POISON_TOKENS = [7, 7, 7, 7]
MIDDLE = 3  # norms of a forward before the one that fails


def poison_rank(number: int, fault: str) -> None:
    """Put the fault into every forward of this process, if its rank is the one that is named."""
    _, guilty, kind = fault.split()
    if number != int(guilty):
        return
    healthy_call, healthy_norm = FusedForward.__call__, FusedForward._add_norm
    norms_left = -1

    def is_bad(batch: ForwardBatch) -> bool:
        if kind == "memory":
            return len(batch.input_ids) > MOST
        runs = batch.input_ids.unfold(0, 4, 1) if len(batch.input_ids) >= 4 else torch.empty(0, 4)
        return bool((runs == torch.tensor(POISON_TOKENS)).all(dim=1).any())

    def call(self: FusedForward, batch: ForwardBatch, heartbeat: Any = None) -> Tensor:
        nonlocal norms_left
        norms_left = MIDDLE if is_bad(batch) else -1
        return healthy_call(self, batch, heartbeat)

    def add_norm(self: FusedForward, *inputs: Any) -> Tensor:
        nonlocal norms_left
        norms_left -= 1
        if norms_left == 0:
            if kind == "memory":
                raise torch.OutOfMemoryError("not for so many tokens")
            raise RuntimeError("poisoned: see /somewhere/secret.py")
        return healthy_norm(self, *inputs)

    FusedForward.__call__ = call  # type: ignore[method-assign]
    FusedForward._add_norm = add_norm  # type: ignore[method-assign]


if __name__ == "__main__":
    healthy_load = parallel.load_rank

    def load_rank(lead: Lead) -> Any:
        poison_rank(lead.rank, os.environ["POISON"])
        return healthy_load(lead)

    parallel.load_rank = load_rank
    sys.exit(rank.main())
