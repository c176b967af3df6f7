"""When the engine tells the API what came out.

On a CPU each message takes a core from the engine: the API wakes up, and writes to as many clients
as there are events in it. With many sequences running, the tokens of a few steps share an event.
What somebody waits for does not wait, nor does it take the others along: a first token, an end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from service.engine.messages import EngineStats, SequenceOutput, StepOutput, StepRecord

_SHORTEST_PAUSE_S = 0.004  # a shorter one costs more than it saves
_LONGEST_PAUSE_S = 0.05  # more than that a reader would see

Part = TypeVar("Part")


class Outbox:
    """Outputs of steps, merged for each sequence until they are due."""

    def __init__(self, max_events_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_events_s`: events a second of all sequences together, from which on they wait."""
        self._max_events_s = max_events_s
        self._clock = clock
        self._waiting: dict[int, SequenceOutput] = {}
        self._known: set[int] = set()  # sequences whose first output was sent
        self._told_at = clock()  # of all that waited
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

    def due(self, num_running: int) -> list[int]:
        """The sequences to tell of now, while `num_running` run: at the end of a pause all of
        them, before it those for whose output somebody waits."""
        pause_s = min(num_running / self._max_events_s, _LONGEST_PAUSE_S)
        now_s = self._clock()
        if pause_s > _SHORTEST_PAUSE_S and now_s - self._told_at < pause_s:
            return list(self._urgent)
        self._told_at = now_s
        return list(self._waiting)

    def take(
        self, sequence_ids: list[int], stats: EngineStats, cpu: int | None = None
    ) -> StepOutput:
        """What there is of these, to be sent now, and every step's record."""
        outputs = [self._waiting.pop(sequence_id) for sequence_id in sequence_ids]
        self._urgent.difference_update(sequence_ids)
        for output in outputs:
            if output.finish_reason is None:
                self._known.add(output.id)
            else:
                self._known.discard(output.id)
        records, self._records = self._records, []
        return StepOutput(outputs, stats, records, cpu)


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
