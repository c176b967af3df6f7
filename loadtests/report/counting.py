"""Operations and bytes of a step, counted by torch while the equation runs, beside those that
follow from the architecture."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from loadtests.report.records import Counted
from model.backends.reference import ReferenceBackend
from model.batch import single_sequence
from model.families import read_config
from model.forward import EagerForward
from model.kv_cache import KVCache
from model.transformer import Transformer
from service.bench.random_weights import random_model
from service.engine.traffic import traffic_of

BLOCK_SIZE = 32
CPU = torch.device("cpu")


class WeightCounter(TorchDispatchMode):
    """Bytes of all parameters that operations were given, each once. Of a table only the rows that
    are looked up are read; they are not counted."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        # By where they lie in memory: products are given views of them.
        self._sizes = {one.untyped_storage().data_ptr(): one.nbytes for one in model.parameters()}
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.embedding.default:
            for argument in args:
                if isinstance(argument, torch.Tensor):
                    self._seen.add(argument.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(size for place, size in self._sizes.items() if place in self._seen)


def count_step(raw: dict[str, object], context: int) -> list[Counted]:
    """A decode step of one sequence at `context` tokens, and the prefill of as many."""
    config, dtype = read_config(raw), torch.float32
    model = random_model(config, context, CPU, dtype, seed=0)
    num_blocks = -(-context // BLOCK_SIZE)
    cache = KVCache.allocate(config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=dtype)
    forward = EagerForward(model, ReferenceBackend(config, cache))
    needs = traffic_of(config, dtype)
    decode_bytes, decode_flops = needs.decode([context])
    kv_bytes = context * needs.kv_bytes_per_token
    found = []
    for what, tokens, flops in (
        (f"prefill of {context} tokens", context, needs.prefill_flops(0, context)),
        (f"decode at context {context}", 1, decode_flops),
    ):
        batch = single_sequence(
            [0] * tokens,
            start=context - tokens,
            block_table=list(range(num_blocks)),
            block_size=BLOCK_SIZE,
        )
        with FlopCounterMode(display=False) as counter, WeightCounter(model) as weights:
            forward(batch)
        counted = float(counter.get_total_flops())
        if tokens > 1:
            # `single_sequence` asks for the logits of every row; a server for those of the last.
            counted -= 2.0 * (tokens - 1) * needs.head_parameters
        needed = decode_bytes - kv_bytes
        found.append(Counted(what, flops, counted, needed, float(weights.total)))
    return found
