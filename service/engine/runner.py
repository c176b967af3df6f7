"""Sequences -> ForwardBatch -> tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch

from model.batch import ForwardBatch
from model.config import ModelConfig
from model.cpu import RowPadding
from model.forward import Forward
from model.kv_cache import KVCache
from model.sampling import SampledTokens, SamplingBatch, SamplingRow, sample
from model.token_mask import TokenMask
from service.engine.profile import StepProfile
from service.engine.scheduler import Scheduled
from service.engine.sequence import Sequence
from service.engine.sights import NOTHING_SEEN, Sights, Watcher, seen

NOTHING_SAMPLED = SampledTokens(torch.empty(0, dtype=torch.int64))


# What libraries under torch say when they find no memory, in a plain RuntimeError.
_NO_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "CUDA out of memory")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a step was too large, rather than wrong."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


class Result(Protocol):
    """A launched step."""

    def read(self, profile: StepProfile) -> SampledTokens:
        """Its tokens, once they are there; row i belongs to the i-th item of the step that
        samples. The wait is added to `profile`."""
        ...

    @property
    def sights(self) -> Sights:
        """What sequences saw that explain themselves; there when the tokens are."""
        ...


class StepRunner(Protocol):
    """Runs the model over what the scheduler chose."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def cache(self) -> KVCache:
        """The one that the forward reads and writes."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def can_watch(self) -> bool:
        """Whether it tells what sequences look at that explain themselves."""
        ...

    def launch(self, step: list[Scheduled], profile: StepProfile) -> Result:
        """Start a forward and a draw. The time each part took is added to `profile`."""
        ...

    def clear(self, blocks: list[int]) -> None:
        """Zero these blocks of the cache."""
        ...

    def free_memory(self) -> None:
        """Give back what is kept for later steps: this one found none."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step whose tokens were there when it returned."""

    tokens: SampledTokens
    sights: Sights = field(default_factory=dict)

    def read(self, profile: StepProfile) -> SampledTokens:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Runner:
    """The plain runner: fresh tensors for each step, and nothing returns before it is done."""

    forward: Forward
    cache: KVCache  # the one that `forward` reads and writes
    config: ModelConfig
    eos_token_ids: tuple[int, ...]
    device: torch.device
    # Rows of a step, and rows whose logits are wanted, are padded so that a row's result does
    # not depend on how many others there are (README, "The same tokens in any company").
    padding: RowPadding
    # Called between layers with the step's number of tokens: a sign of life.
    heartbeat: Callable[[int], None] | None = None
    watcher: Watcher = field(init=False)

    def __post_init__(self) -> None:
        watcher = Watcher(self.config, self.cache.block_size, self.device)
        object.__setattr__(self, "watcher", watcher)

    @property
    def can_watch(self) -> bool:
        return True

    def launch(self, step: list[Scheduled], profile: StepProfile) -> Done:
        """Here launched is done."""
        return Done(*self.run(step, profile))

    def clear(self, blocks: list[int]) -> None:
        self.cache.clear(blocks)

    def free_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def run(self, step: list[Scheduled], profile: StepProfile) -> tuple[SampledTokens, Sights]:
        """One forward and one draw. Row i of the tokens belongs to the i-th item of `step`
        that samples; beside them, what those saw that explain themselves. The time each part
        took is added to `profile`."""
        began = time.monotonic()
        batch = build_batch(step, self.cache.block_size, self.padding, self.device)
        batch = self.watcher.watching(batch, step)
        drawing = [item.sequence for item in step if item.samples]
        rows = [_sampling_row(sequence) for sequence in drawing]
        sampling = SamplingBatch.build(
            rows,
            self.config.vocab_size,
            self.device,
            self.eos_token_ids,
            build_mask(drawing, self.device),
        )
        built = time.monotonic()
        profile.build_s += built - began
        heartbeat = None
        if self.heartbeat is not None:
            heartbeat = partial(self.heartbeat, batch.num_tokens)
        logits = self.forward(batch, heartbeat)[: len(rows)]
        forwarded = time.monotonic()
        profile.forward_s += forwarded - built
        if not rows:
            return NOTHING_SAMPLED, NOTHING_SEEN
        tokens = sample(logits, sampling)
        sampled = time.monotonic()
        profile.sample_s += sampled - forwarded
        sights = seen(batch, step)
        profile.look_s += time.monotonic() - sampled
        return tokens, sights


def _sampling_row(sequence: Sequence) -> SamplingRow:
    """What the sampler must know; the token lists are copied only where they are read."""
    params, tokens, num_prompt = sequence.sampling, sequence.token_ids, sequence.num_prompt
    if params.has_penalties or params.min_tokens:
        return SamplingRow(params, len(tokens), tokens[:num_prompt], tokens[num_prompt:])
    return SamplingRow(params, len(tokens))


def build_mask(sequences: list[Sequence], device: torch.device) -> TokenMask | None:
    """What the grammars of the sequences allow next; None when none has a grammar. A grammar
    that fails allows nothing, and its matcher says why."""
    masked = [(i, s.matcher) for i, s in enumerate(sequences) if s.matcher is not None]
    if not masked:
        return None
    words = np.empty((len(masked), masked[0][1].num_words), np.int32)
    for place, (_, matcher) in enumerate(masked):
        matcher.fill(words[place])
    rows = None
    if len(masked) < len(sequences):
        rows = torch.tensor([i for i, _ in masked], device=device)
    return TokenMask(rows, torch.from_numpy(words).to(device))


def build_batch(
    step: list[Scheduled], block_size: int, padding: RowPadding, device: torch.device
) -> ForwardBatch:
    """Flatten the chosen tokens of all sequences into one row, padded as `padding` says."""
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_start = [0]
    context_lens: list[int] = []
    logits_rows: list[int] = []
    for item in step:
        sequence, start = item.sequence, item.sequence.num_computed
        end = start + item.num_tokens
        input_ids += sequence.token_ids[start:end]
        positions += range(start, end)
        slots += [
            sequence.blocks[p // block_size] * block_size + p % block_size
            for p in range(start, end)
        ]
        query_start.append(len(input_ids))
        context_lens.append(end)
        if item.samples:
            logits_rows.append(len(input_ids) - 1)
    num_padding = padding.padded(len(input_ids)) - len(input_ids)
    input_ids += [0] * num_padding
    positions += [0] * num_padding
    slots += [-1] * num_padding
    if logits_rows:
        logits_rows += [0] * (padding.padded(len(logits_rows)) - len(logits_rows))
    width = max(len(item.sequence.blocks) for item in step)
    tables: list[int] = []
    for item in step:
        blocks = item.sequence.blocks
        tables += blocks
        tables += [0] * (width - len(blocks))

    # All numbers as one tensor, which the others are parts of: torch takes longer for each list
    # that it makes a tensor of than for all that is in it.
    parts = (input_ids, positions, query_start, context_lens, slots, logits_rows, tables)
    numbers = torch.from_numpy(np.array([n for part in parts for n in part], np.int64)).to(device)
    ids, places, starts, lens, slot_mapping, rows, table = numbers.split([len(p) for p in parts])
    return ForwardBatch(
        input_ids=ids,
        positions=places,
        query_start=starts,
        context_lens=lens,
        block_tables=table.view(len(step), width),
        slot_mapping=slot_mapping,
        logits_rows=rows,
        query_start_host=tuple(query_start),
        context_lens_host=tuple(context_lens),
    )
