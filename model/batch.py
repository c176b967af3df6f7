"""ForwardBatch: every tensor one forward needs, passed explicitly.

All sequences of a step are flattened into one row of tokens, without padding between
them: prefill chunks and single decode tokens travel together. Sequence i owns the rows
query_start[i] .. query_start[i + 1].

    tokens   | a a a a | b | c c | . |      4-token chunk, decode, 2-token chunk, padding
    query_start = 0 4 5 7                   the padding row belongs to no sequence
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Watch:
    """Sequences of a batch whose last query somebody wants to follow: the forward adds that
    query's attention weights up. Made by `watch` in model/explain/attended.py, once a step."""

    seqs: tuple[int, ...]  # numbers of sequences in the batch: the rows of what follows
    heads: tuple[tuple[int, int, int], ...]  # (row, layer, head) chosen, row after row
    # Zeros before the step; columns are positions, rounded up to whole blocks.
    sums: Float[Tensor, "num_rows num_kv_heads columns"]  # over layers, and heads of a KV head
    chosen: Float[Tensor, "num_chosen columns"]  # of each of `heads`
    # After the step, largest first: positions and weights of each row's mean and then of its chosen
    # heads; each row's likeliest next tokens. -1 where there are no more, or they got nothing.
    places: Int[Tensor, "num_rows_and_chosen num_places"]
    weights: Float[Tensor, "num_rows_and_chosen num_places"]
    tokens: Int[Tensor, "num_rows num_tokens"]
    logprobs: Float[Tensor, "num_rows num_tokens"]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Which sequences attention takes in which way, on a GPU. The first `num_decodes` have one
    token each; the others are cut into tiles of their tokens."""

    num_decodes: int
    tile_seqs: Int[Tensor, " num_tiles"]  # a tile's sequence
    tile_starts: Int[Tensor, " num_tiles"]  # its first token, counted in that sequence's tokens


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input.

    `num_tokens` counts the padding rows at the end; `query_start[-1]` does not. A padding
    row has slot -1: its key and value are written nowhere and nobody reads its output.
    The lengths are plain numbers too (`*_host`), so that a backend on the CPU need not
    read them back from tensors.
    """

    input_ids: Int[Tensor, " num_tokens"]
    positions: Int[Tensor, " num_tokens"]
    query_start: Int[Tensor, " num_seqs_plus_1"]
    context_lens: Int[Tensor, " num_seqs"]  # keys visible to the last query of each sequence
    block_tables: Int[Tensor, "num_seqs max_blocks"]  # cache blocks, padded with 0
    slot_mapping: Int[Tensor, " num_tokens"]  # block * block_size + offset; -1: nowhere
    logits_rows: Int[Tensor, " num_logits"]  # the rows whose logits are wanted
    query_start_host: tuple[int, ...]
    context_lens_host: tuple[int, ...]
    watch: Watch | None = None
    plan: AttentionPlan | None = None  # None: a backend that wants one makes it

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens_host)

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])


def single_sequence(
    token_ids: list[int], *, start: int = 0, block_table: list[int], block_size: int
) -> ForwardBatch:
    """A batch of one sequence: `token_ids` at positions start, start + 1, ...

    For tests, inspection and offline use; the engine builds its batches in
    `service/engine/runner.py`. Logits are wanted for every row.
    """
    num_tokens = len(token_ids)
    positions = torch.arange(start, start + num_tokens)
    table = torch.tensor([block_table], dtype=torch.int64)
    slots = table[0, positions // block_size] * block_size + positions % block_size
    return ForwardBatch(
        input_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=positions,
        query_start=torch.tensor([0, num_tokens]),
        context_lens=torch.tensor([start + num_tokens]),
        block_tables=table,
        slot_mapping=slots,
        logits_rows=torch.arange(num_tokens),
        query_start_host=(0, num_tokens),
        context_lens_host=(start + num_tokens,),
    )
