"""When the engine tells the API what came out.

On a CPU each message takes a core from the engine, whose other threads then wait for that one:
the API wakes up, and writes to as many clients as there are tokens in it. With many sequences
running, the tokens of a few steps share a message, and so an event. What somebody waits for
does not wait, nor does it take the others along: a first token, an end.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from service.engine.explain_messages import Sight
from service.engine.messages import (
    EngineStats,
    SequenceOutput,
    StepOutput,
    StepRecord,
    TokenLogprob,
)

_SHORTEST_PAUSE_S = 0.004  # a shorter one costs more than it saves
_LONGEST_PAUSE_S = 0.05  # more than that a reader would see


class Outbox:
    """Outputs of steps, merged for each sequence until they are due."""

    def __init__(self, max_events_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_events_s`: events a second of all sequences together, from which on they wait."""
        self._max_events_s = max_events_s
        self._clock = clock
        self._waiting: dict[int, list[SequenceOutput]] = {}
        self._known: set[int] = set()  # sequences whose first output was sent
        self._sent_at = clock()
        self._urgent: set[int] = set()
        self._records: list[StepRecord] = []

    def add(self, outputs: list[SequenceOutput], record: StepRecord | None = None) -> None:
        """What a step gave, and what it was."""
        if record is not None:
            self._records.append(record)
        waiting, known = self._waiting, self._known
        for output in outputs:
            sequence_id = output.id
            if sequence_id in waiting:
                waiting[sequence_id].append(output)
            else:
                waiting[sequence_id] = [output]
            if output.finish_reason is not None or sequence_id not in known:
                self._urgent.add(sequence_id)

    def forget(self, sequence_id: int) -> None:
        """It was aborted: nothing of it is sent any more."""
        self._waiting.pop(sequence_id, None)
        self._known.discard(sequence_id)
        self._urgent.discard(sequence_id)

    def due(self, num_running: int) -> list[int]:
        """The sequences to tell of now, while `num_running` run: all of them in one message at
        the end of a pause, before it those for whose output somebody waits."""
        pause_s = min(num_running / self._max_events_s, _LONGEST_PAUSE_S)
        if pause_s > _SHORTEST_PAUSE_S and self._clock() - self._sent_at < pause_s:
            return list(self._urgent)
        self._sent_at = self._clock()
        return list(self._waiting)

    def take(self, sequence_ids: list[int], stats: EngineStats) -> StepOutput:
        """What there is of these, to be sent now, and every step's record."""
        outputs = [merged(self._waiting.pop(sequence_id)) for sequence_id in sequence_ids]
        self._urgent.difference_update(sequence_ids)
        for output in outputs:
            if output.finish_reason is None:
                self._known.add(output.id)
            else:
                self._known.discard(output.id)
        records, self._records = self._records, []
        return StepOutput(outputs, stats, records)


def merged(parts: list[SequenceOutput]) -> SequenceOutput:
    """Outputs of one sequence, in this order, as one."""
    first, last = parts[0], parts[-1]
    if len(parts) == 1:
        return first
    token_ids: list[int] = []
    num_cached = 0
    logprobs: list[TokenLogprob] | None = None
    explained: list[Sight] | None = None
    for part in parts:  # one loop, as it stands between two steps
        token_ids += part.token_ids
        if part.cached_prompt_tokens > num_cached:
            num_cached = part.cached_prompt_tokens
        if part.logprobs is not None:
            logprobs = [*(logprobs or ()), *part.logprobs]
        if part.explained is not None:
            explained = [*(explained or ()), *part.explained]
    return SequenceOutput(
        id=last.id,
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        error=last.error,
        is_grammar_error=last.is_grammar_error,
        cached_prompt_tokens=num_cached,
        queue_s=first.queue_s,
        prefill_s=first.prefill_s,
        explained=explained,
    )
