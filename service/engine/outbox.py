"""When the engine tells the API what came out.

On a CPU each event takes a core from the engine, whose other threads then wait for that one. With
many sequences running, the tokens of a few steps share an event. What somebody waits for does not
wait, nor does it take the others along: a first token, an end.

The events of a pause are not told at once but in turn, a few with each step: in short steps when
the tokens are drawn and not yet booked. From there to the next forward the engine computes on one
core only, and what the API does with a few events fits into that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import TypeVar

from service.engine.messages import EngineStats, SequenceOutput, StepOutput, StepRecord

_SHORTEST_PAUSE_S = 0.004  # a shorter one costs more than it saves
_FEWEST_EVENTS = 5  # of a message: each wakes the API up
_LONGEST_PAUSE_S = 0.05  # more than that a reader would see

Part = TypeVar("Part")


class Outbox:
    """Outputs of steps, merged for each sequence until they are due."""

    def __init__(self, max_events_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_events_s`: events a second of all sequences together, from which on they wait."""
        self._max_events_s = max_events_s
        self._clock = clock
        self._waiting: dict[int, SequenceOutput] = {}  # the oldest first
        self._known: set[int] = set()  # sequences whose first output was sent
        self._looked_at = clock()
        self._allowed = 0.0  # events that may be told, and were not
        self._urgent: set[int] = set()
        self._records: list[StepRecord] = []

    def add(self, outputs: list[SequenceOutput], record: StepRecord | None = None) -> None:
        """What a step gave, and what it was. The outputs are the outbox's from now on."""
        if record is not None:
            self._records.append(record)
        waiting, known = self._waiting, self._known
        for output in outputs:
            sequence_id = output.id
            before = waiting.get(sequence_id)
            if before is None:
                waiting[sequence_id] = output
            elif is_plain(output):  # nearly all are: this stands between two steps
                before.token_ids.extend(output.token_ids)
            else:
                waiting[sequence_id] = merged(before, output)
            if output.finish_reason is not None or sequence_id not in known:
                self._urgent.add(sequence_id)

    def forget(self, sequence_id: int) -> None:
        """It was aborted: nothing of it is sent any more."""
        self._waiting.pop(sequence_id, None)
        self._known.discard(sequence_id)
        self._urgent.discard(sequence_id)

    def due(self, num_running: int, *, in_turn: bool) -> list[int]:
        """The sequences to tell of now, while `num_running` run: those for whose output somebody
        waits, and all where they are few. `in_turn`: also those that have waited longest, so many
        that each has its turn once in a pause, unless they are too few to be worth a message."""
        pause_s = min(num_running / self._max_events_s, _LONGEST_PAUSE_S)
        if pause_s <= _SHORTEST_PAUSE_S:
            return list(self._waiting)
        due = list(self._urgent)
        if not in_turn:
            return due
        now_s = self._clock()
        since_s, self._looked_at = now_s - self._looked_at, now_s
        self._allowed = min(self._allowed + num_running * since_s / pause_s, num_running)
        if self._allowed >= min(_FEWEST_EVENTS, num_running):
            patient = (one for one in self._waiting if one not in self._urgent)
            patient_due = list(islice(patient, int(self._allowed)))
            self._allowed -= len(patient_due)
            due += patient_due
        return due

    def take(self, sequence_ids: list[int], stats: EngineStats) -> StepOutput:
        """What there is of these, to be sent now, and every step's record."""
        outputs = [self._waiting.pop(sequence_id) for sequence_id in sequence_ids]
        self._urgent.difference_update(sequence_ids)
        for output in outputs:
            if output.finish_reason is None:
                self._known.add(output.id)
            else:
                self._known.discard(output.id)
        records, self._records = self._records, []
        return StepOutput(outputs, stats, records)


def is_plain(output: SequenceOutput) -> bool:
    """Whether it says nothing but token ids, and perhaps what the sequence's first output said."""
    return output.finish_reason is None and output.logprobs is None and output.explained is None


def merged(first: SequenceOutput, then: SequenceOutput) -> SequenceOutput:
    """Two outputs of one sequence, the second after the first, as one."""
    return SequenceOutput(
        id=then.id,
        token_ids=first.token_ids + then.token_ids,
        logprobs=_joined(first.logprobs, then.logprobs),
        finish_reason=then.finish_reason,
        stop_token_id=then.stop_token_id,
        error=then.error,
        is_grammar_error=then.is_grammar_error,
        cached_prompt_tokens=max(first.cached_prompt_tokens, then.cached_prompt_tokens),
        queue_s=first.queue_s,
        prefill_s=first.prefill_s,
        explained=_joined(first.explained, then.explained),
    )


def _joined(first: list[Part] | None, then: list[Part] | None) -> list[Part] | None:
    return then if first is None else first + (then or [])
