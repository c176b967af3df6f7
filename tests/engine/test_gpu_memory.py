"""How the memory of a GPU is shared out, without one."""

from __future__ import annotations

import pytest
import torch

from model.backends.cuda import CudaBackend
from model.fused import FusedForward
from model.kernels.gpu.kernels import TWINS
from model.kv_cache import KVCache
from service.engine.device.memory import GIB, Memory, OutOfMemoryError, largest_step
from service.engine.scheduler import Limits
from tests.engine.engines import TINY, random_model

MEMORY = Memory(total=80 * GIB, in_use=17 * GIB, step=3 * GIB, graphs=GIB)


def test_blocks_take_what_the_rest_leaves() -> None:
    assert MEMORY.num_blocks(0.9, 2**20, 100) == (72 - 17 - 3 - 1) * 1024


def test_too_little_is_told_with_the_arithmetic() -> None:
    with pytest.raises(OutOfMemoryError) as error:
        MEMORY.num_blocks(0.27, 2**20, 1024)
    for part in ("80.00 GiB of GPU memory x gpu-memory-utilization 0.27", "17.00 GiB in use",
                 "3.00 GiB for the largest step", "1.00 GiB for graphs leave 0.60 GiB",
                 "one sequence of full length needs 1.00 GiB", "max-model-len"):  # fmt: skip
        assert part in str(error.value)


def test_the_largest_step_runs_and_writes_nothing() -> None:
    model = random_model(TINY)
    cache = KVCache.allocate(TINY, num_blocks=1, block_size=8, dtype=torch.float32, by_token=True)
    forward = FusedForward(model, CudaBackend(TINY, cache, 256, kernels=TWINS))
    sizes: list[tuple[int, int]] = []
    call = forward.__call__

    def watched(batch: object) -> torch.Tensor:
        logits = call(batch)  # type: ignore[arg-type]
        sizes.append((batch.num_tokens, logits.shape[0]))  # type: ignore[attr-defined]
        return logits

    largest_step(watched, TWINS, Limits(4, 64, 256), TINY.vocab_size, torch.device("cpu"))  # type: ignore[arg-type]
    assert sizes == [(64, 4)]
    assert not cache.values.any()
