"""The call of attended.c: where watched rows looked, all layers in one parallel region."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from model.batch import ForwardBatch, Watch
from model.explain.attended import Attended, ChosenHead
from model.kernels import native, structs


def attended(
    model: structs.Model, batch: ForwardBatch, watch: Watch, chosen: Sequence[ChosenHead]
) -> Attended:
    """The weights of the watched rows, from the keys in the model's cache."""
    seqs = list(watch.seqs)
    contexts, tables = batch.context_lens[seqs], batch.block_tables[seqs].contiguous()
    longest = max(batch.context_lens_host[seq] for seq in seqs)
    stride = -(-longest // model.block_size) * model.block_size
    threads = torch.get_num_threads()
    chosen_rows = torch.tensor(chosen, dtype=torch.int64).view(-1, 3)
    partial = torch.empty(len(seqs), model.num_layers, stride)
    weights = torch.empty(threads, stride)
    mean, heads = torch.empty(len(seqs), stride), torch.zeros(len(chosen), stride)
    call = structs.Watch(
        num_threads=threads,
        num_rows=len(seqs),
        num_chosen=len(chosen),
        stride=stride,
        max_blocks=tables.shape[1],
        queries=watch.queries.data_ptr(),
        contexts=contexts.data_ptr(),
        tables=tables.data_ptr(),
        chosen=chosen_rows.data_ptr(),
        partial=partial.data_ptr(),
        weights=weights.data_ptr(),
        mean=mean.data_ptr(),
        heads=heads.data_ptr(),
    )
    native.load().vitrine_attended(ctypes.byref(model), ctypes.byref(call))
    return Attended(mean[:, :longest], heads[:, :longest])
