"""How many KV blocks a GPU has room for.

    budget = total * gpu_memory_utilization
    blocks = budget - what is in use after loading - the largest step - graphs' scratch memory

What is in use counts other processes too, and what torch keeps. The largest step is run once and
its peak measured; the graphs of decode steps have scratch memory of their own, which a decode
step at full width measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from model.batch import ForwardBatch
from model.forward import Forward
from model.fused import FusedForward
from model.kernels.gpu.draw import DrawRows
from model.kernels.gpu.kernels import Kernels
from model.sampling import score
from service.engine.scheduler import Limits

GIB = 2**30
MOST_LOGPROBS = 20  # of a row of the largest step


class OutOfMemoryError(Exception):
    """The cache does not fit; the message holds the arithmetic."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one GPU."""

    total: int
    in_use: int  # after loading: weights, the CUDA context, other processes
    step: int
    graphs: int

    def num_blocks(self, utilization: float, per_block: int, least: int) -> int:
        """Blocks of `per_block` bytes that there is room for. Raises `OutOfMemoryError` when they
        are fewer than `least`, those of one sequence of full length."""
        left = int(self.total * utilization) - self.in_use - self.step - self.graphs
        if left // per_block >= least:
            return left // per_block
        raise OutOfMemoryError(
            f"the KV cache does not fit: {_gib(self.total)} of GPU memory x "
            f"gpu-memory-utilization {utilization} - {_gib(self.in_use)} in use after loading - "
            f"{_gib(self.step)} for the largest step - {_gib(self.graphs)} for graphs leave "
            f"{_gib(left)}; one sequence of full length needs {_gib(least * per_block)}. A lower "
            "max-model-len, max-batched-tokens or max-num-seqs, or a higher "
            "gpu-memory-utilization, may help"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def measure(
    forward: FusedForward, kernels: Kernels, limits: Limits, vocab_size: int, device: torch.device
) -> Memory:
    """Run the largest steps there can be on a GPU and see what they take. `forward` has a cache
    of at least one block, which is read and not written. Raises `OutOfMemoryError` when they find
    no room, after both: other GPUs may have the other parts of the model."""
    decodes = Limits(limits.max_num_seqs, limits.max_num_seqs, limits.max_model_len)
    peaks, problem = [0, 0], ""
    for number, most in enumerate((limits, decodes)):
        try:
            with forward.step(most.max_batched_tokens, most.max_num_seqs):
                peaks[number] = _peak(
                    partial(largest_step, forward, kernels, most, vocab_size, device), device
                )
        except torch.OutOfMemoryError as error:
            problem = problem or str(error).partition("\n")[0]
    if problem:
        raise OutOfMemoryError(f"the largest step does not fit: {problem}")
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return Memory(total, total - free, *peaks)


def _peak(work: Callable[[], None], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@torch.inference_mode()
def largest_step(
    forward: Forward, kernels: Kernels, limits: Limits, vocab_size: int, device: torch.device
) -> None:
    """As many tokens as a step may have, of as many sequences, all of which are drawn from and
    ask for log-probabilities. The slots are -1: nothing is written."""
    rows = limits.max_num_seqs
    starts = (*range(rows), limits.max_batched_tokens)
    lengths = [end - start for start, end in pairwise(starts)]

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    longest = min(max(lengths), limits.max_model_len)
    batch = ForwardBatch(
        input_ids=ints([0] * starts[-1]),
        positions=ints([0] * starts[-1]),
        query_start=ints(list(starts)),
        context_lens=ints([min(length, longest) for length in lengths]),
        block_tables=torch.zeros(rows, longest, dtype=torch.int32, device=device),
        slot_mapping=ints([-1] * starts[-1]),
        logits_rows=ints([end - 1 for end in starts[1:]]),
        query_start_host=starts,
        context_lens_host=tuple(min(length, longest) for length in lengths),
    )
    logits = forward(batch)
    draw = DrawRows(
        inverse_temperature=torch.ones(rows, device=device),
        top_k=ints([50] * rows),
        top_p=torch.full((rows,), 0.9, device=device),
        min_p=torch.full((rows,), -100.0, device=device),
        seeds=torch.zeros(2, rows, dtype=torch.int32, device=device),
        positions=ints([0] * rows),
        seats=ints([0] * rows),
    )
    plain = logits.clone()
    token_ids, _ = kernels.draw(logits, draw, ints([0]))
    score(plain, token_ids, [(row, min(MOST_LOGPROBS, vocab_size)) for row in range(rows)])
