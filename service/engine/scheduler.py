"""Who runs in the next step.

Continuous batching: sequences join and leave between steps, prefill chunks and decodes
share a step under one token budget. The order of service is (priority, arrival):

1. running sequences that decode: one token each, always within the budget;
2. running sequences in the middle of their prompt: the next chunk;
3. waiting sequences, while there are seats, tokens and blocks.

When a running sequence needs a block and none is left, the running sequence that comes last
in the order gives all of its blocks back and waits again (preemption by recompute). The
first in the order always gets on, and what alone would not fit was refused at the door, so
there is no dead end.

A step that did not fit the device's memory is run again with half of its tokens, and so is what
comes after it, for a while: `shrink`. A chunk of a prompt gets shorter by that; of sequences that
decode, a token each, those that come last in the order are preempted.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from service.engine.blocks import BlockPool
from service.engine.sequence import Sequence

# Steps that must fit before twice as many tokens are tried again; longer after each failure.
FIRST_PATIENCE = 64
MAX_PATIENCE = 2**14
# What came during a step is taken up no more than so many seconds after it (a burst waits for the
# next of it, burst.py): what is taken up later came later.
PICKUP_S = 0.01
# Tokens after which a sequence waits no longer for those that did not come later. A burst of up to
# as many whole steps of prompts begins before its first sequences have written them.
SETTLED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one step and of one sequence."""

    max_num_seqs: int
    max_batched_tokens: int
    max_model_len: int

    def __post_init__(self) -> None:
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens {self.max_batched_tokens} is less than max_num_seqs "
                f"{self.max_num_seqs}: a step could not give every sequence its one token"
            )


class Phases(NamedTuple):
    """Numbers of sequences."""

    starting: int  # have a seat, or would get one, and wait for their first token
    decoding: int  # write, and wait for each step
    settled: int  # of these, are not to wait for the next prompt: see `Scheduler.phases`


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The next `num_tokens` uncomputed tokens of a sequence run in this step."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's end, so that its next token is drawn."""
        return self.num_tokens == self.sequence.num_uncomputed


@dataclass(frozen=True, slots=True)
class Launched:
    """What a step computes of a sequence, kept until its result is read: the sequence may have
    moved on by then."""

    sequence: Sequence
    start: int
    end: int
    samples: bool
    num_preemptions: int


@dataclass(slots=True)
class Scheduler:
    """The queues and the policy. Plain Python: tested without a model."""

    limits: Limits
    pool: BlockPool
    waiting: list[Sequence] = field(default_factory=list)  # sorted by rank
    running: list[Sequence] = field(default_factory=list)  # sorted by rank
    num_preemptions: int = 0
    num_cache_queries: int = 0  # tokens looked for in the prefix cache
    num_cache_hits: int = 0  # tokens found there
    num_shortages: int = 0  # steps that did not fit the memory
    _arrivals: int = 0
    _ceiling: int | None = None  # tokens of a step that should fit; None: as many as the limits say
    _num_fitting: int = 0  # steps since it was set
    _patience: int = FIRST_PATIENCE

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def phases(self) -> Phases:
        """How far the sequences are. Who writes is settled if whoever is next to begin came later,
        or if it has written `SETTLED_TOKENS`."""
        decoding = [sequence for sequence in self.running if is_decode(sequence)]
        seats = self.limits.max_num_seqs - len(decoding)
        starting = min(len(self.running) - len(decoding) + len(self.waiting), seats)
        if not starting:
            return Phases(0, len(decoding), len(decoding))
        in_prompt = (sequence for sequence in self.running if not is_decode(sequence))
        first = next(in_prompt, None) or self.waiting[0]
        settled = sum(
            one.began_at < first.arrived_at - PICKUP_S or one.num_output >= SETTLED_TOKENS
            for one in decoding
        )
        return Phases(starting, len(decoding), settled)

    def refusal(self, num_prompt: int, max_tokens: int) -> str | None:
        """Why a sequence of these lengths could never run, or None when it could."""
        wanted = num_prompt + max_tokens
        if wanted > self.limits.max_model_len:
            return (
                f"prompt of {num_prompt} tokens and max_tokens {max_tokens} need {wanted} "
                f"positions; the context has {self.limits.max_model_len}"
            )
        blocks = self._blocks_for(wanted)
        if blocks > self.pool.num_blocks:
            return (
                f"prompt of {num_prompt} tokens and max_tokens {max_tokens} need {blocks} KV "
                f"blocks of {self.pool.block_size} tokens; the cache has {self.pool.num_blocks}"
            )
        return None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `refusal` has nothing against."""
        sequence.order = self._arrivals
        self._arrivals += 1
        insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or aborted sequence out; its blocks are free at once."""
        queue = self.running if sequence in self.running else self.waiting
        queue.remove(sequence)
        self._give_back(sequence)

    def discard(self, sequence: Sequence) -> list[int]:
        """Take a sequence out whose keys and values cannot be trusted: no prefix in its blocks
        is known any more. Returns the blocks that nobody else holds: they are free now, and
        what is in them is to be cleared."""
        blocks = self.pool.forget(sequence.blocks)
        self.remove(sequence)
        return blocks

    @property
    def max_tokens(self) -> int:
        """Of a step, at the moment."""
        most = self.limits.max_batched_tokens
        return most if self._ceiling is None else min(most, self._ceiling)

    @property
    def max_running(self) -> int:
        """Sequences: each must have its one token."""
        return min(self.limits.max_num_seqs, self.max_tokens)

    def shrink(self, num_tokens: int) -> bool:
        """A step of `num_tokens` tokens did not fit the memory, and none of it was launched. Steps
        have half as many from now on, and as many sequences at most: the others are preempted,
        the last in the order first. False when it was one token: that is as small as steps get,
        so it is no matter of the size."""
        self.num_shortages += 1
        if num_tokens <= 1:
            self._ceiling = None
            return False
        if self._ceiling is not None:
            self._patience = min(2 * self._patience, MAX_PATIENCE)
        self._ceiling, self._num_fitting = num_tokens // 2, 0
        while len(self.running) > self.max_running:
            self._preempt(self.running[-1])
        return True

    def fitted(self) -> None:
        """A step was launched. Enough of them, and larger ones are tried again."""
        if self._ceiling is None:
            return
        self._num_fitting += 1
        if self._num_fitting >= self._patience:
            self._num_fitting = 0
            self._ceiling *= 2
            if self._ceiling >= self.limits.max_batched_tokens:
                self._ceiling = None

    def schedule(self, prompt_tokens: int | None = None) -> list[Scheduled]:
        """Choose this step's tokens and give every chosen sequence the blocks for them.

        `prompt_tokens` bounds those of prompts beside decodes; alone they have the whole budget.
        """
        budget = self.max_tokens
        has_decodes = any(is_decode(sequence) for sequence in self.running)
        prompt_budget = budget if prompt_tokens is None or not has_decodes else prompt_tokens
        step: dict[int, Scheduled] = {}
        preempted: set[int] = set()
        for sequence in self._service_order():
            if sequence.id in preempted or budget == 0 or sequence.is_full:
                continue
            count = min(sequence.num_uncomputed, budget)
            if not is_decode(sequence):
                count = min(count, prompt_budget)
                if count == 0:
                    continue
            while not self._grow(sequence, sequence.num_computed + count):
                victim = self.running[-1]
                self._preempt(victim)
                preempted.add(victim.id)
                if victim is sequence:
                    break
                if (item := step.pop(victim.id, None)) is not None:
                    budget += item.num_tokens
            else:
                step[sequence.id] = Scheduled(sequence, count)
                budget -= count
                if not is_decode(sequence):
                    prompt_budget -= count
        # After a preemption the pool is full: admitting now would preempt again.
        while self.waiting and min(budget, prompt_budget) > 0 and not preempted:
            sequence = self.waiting[0]
            if len(self.running) >= self.max_running or not self._admit(sequence):
                break
            count = min(sequence.num_uncomputed, budget, prompt_budget)
            self._grow(sequence, sequence.num_computed + count)
            step[sequence.id] = Scheduled(sequence, count)
            budget -= count
            prompt_budget -= count
        return list(step.values())

    def launched(self, item: Scheduled) -> Launched:
        """Count a step's tokens as computed: what is launched later finds them there. Call
        before the sampled token is appended."""
        sequence, samples = item.sequence, item.samples
        start = sequence.num_computed
        sequence.num_computed += item.num_tokens
        return Launched(sequence, start, sequence.num_computed, samples, sequence.num_preemptions)

    def computed(self, item: Launched) -> None:
        """Remember the blocks that a step filled, now that all their tokens are known; those of
        a sequence that was preempted meanwhile are its own no more."""
        sequence, size = item.sequence, self.pool.block_size
        if sequence.num_preemptions != item.num_preemptions:
            return
        full_before, full = item.start // size, item.end // size
        if full > full_before:
            hashes = sequence.hashes(full, size)
            for index in range(full_before, full):
                self.pool.remember(sequence.blocks[index], hashes[index])

    def _service_order(self) -> Iterator[Sequence]:
        """Decodes before prompt chunks, so that no running stream stalls behind a prompt."""
        snapshot = list(self.running)
        yield from (s for s in snapshot if is_decode(s))
        yield from (s for s in snapshot if not is_decode(s))

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for `num_tokens` tokens; False when the pool has not enough."""
        missing = self._blocks_for(num_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        if missing > self.pool.num_available:
            return False
        sequence.blocks += self.pool.allocate(missing)
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Move the first waiting sequence to the running ones if the pool has room for all
        it has to compute now; a known prefix is taken from the cache."""
        size = self.pool.block_size
        # At least the last token must be computed: its logits are wanted.
        known = self.pool.find(sequence.hashes((len(sequence.token_ids) - 1) // size, size))
        wanted = self._blocks_for(len(sequence.token_ids)) - len(known)
        if wanted > self.pool.num_available - self.pool.num_idle(known):
            return False
        self.pool.share(known)
        sequence.blocks = known
        sequence.num_computed = len(known) * size
        self.num_cache_queries += len(sequence.token_ids)
        self.num_cache_hits += sequence.num_computed
        if sequence.cached_prompt_tokens is None:
            sequence.cached_prompt_tokens = min(sequence.num_computed, sequence.num_prompt)
        self.waiting.pop(0)
        insort(self.running, sequence, key=_rank)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        insort(self.waiting, sequence, key=_rank)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0


def is_decode(sequence: Sequence) -> bool:
    """Whether its next step is one token, whose successor is drawn."""
    return sequence.num_uncomputed == 1


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
