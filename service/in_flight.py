"""The sequences in flight, and which of them the engine is given.

Everything at once, as long as engines live. A sequence that two engines in a row died
computing, without a token from it between, is a suspect: suspects are given to the next engine
one after another, each alone until it shows a token. The one that a third engine dies computing
ends with an error, and the others go on. An engine that was killed from outside says less about
what it computed (an operator, or the system short of memory): there it takes six.

Plain and synchronous: processes and sockets are in `supervisor.py`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from service.backlog import Backlog
from service.engine.messages import (
    Abort,
    EngineFinish,
    MessageTooLargeError,
    SequenceOutput,
    ToEngine,
)
from service.engine_record import EngineRecord
from service.journal import JournalEntry, SequenceRequest

SUSPECT_DEATHS = 2
MAX_DEATHS = 3
MAX_KILLS = 6


@dataclass(frozen=True, slots=True)
class Loss:
    """How an engine was lost, as far as that bears on who is at fault."""

    ids_in_step: frozenset[int] = frozenset()  # computed at the end; empty: none, or not known
    is_from_outside: bool = False  # killed by a signal that its own faults do not raise


NOT_KNOWN = Loss()


class InFlight:
    """The journal of all sequences accepted and not ended.

    `send` gives a message to the engine that runs now; it is called only between
    `engine_ready` and `engine_lost`. It may raise `MessageTooLargeError`.
    """

    def __init__(
        self, send: Callable[[ToEngine], None], backlog: Backlog, record: EngineRecord
    ) -> None:
        self.nothing = asyncio.Event()  # set while nothing is in flight
        self.nothing.set()
        self._send = send
        self._backlog = backlog
        self._record = record
        self._has_engine = False
        self._ids = itertools.count(1)
        self._entries: dict[int, JournalEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[JournalEntry]:
        return iter(list(self._entries.values()))

    def add(self, requests: list[SequenceRequest]) -> list[JournalEntry]:
        """Accept these; the engine gets them now, or when there is one."""
        entries = [JournalEntry(next(self._ids), request, self.drop) for request in requests]
        for entry in entries:
            self._entries[entry.id] = entry
            self._backlog.add(entry.id, entry.request.num_tokens)
            self.nothing.clear()
        self._send_due()
        return entries

    def drop(self, entry: JournalEntry) -> None:
        """Its reader wants no more of it; unknown ones (already ended) are nothing to do."""
        if not self._forget(entry):
            return
        if entry.is_sent and self._has_engine:
            self._send(Abort(entry.id))
        if _is_suspect(entry):
            self._send_due()

    def end(self, entry: JournalEntry, reason: EngineFinish, error: str | None = None) -> None:
        """End it from this side, with the tokens it has."""
        self.drop(entry)
        entry.receive(SequenceOutput(entry.id, [], finish_reason=reason, error=error))

    def engine_ready(self) -> None:
        """There is an engine, and it has nothing yet."""
        self._has_engine = True
        self._send_due()

    def engine_lost(self, loss: Loss = NOT_KNOWN) -> None:
        """The engine died: what it was computing may be the reason, or, when it died between
        steps, whatever it had been given. One that died while it was loading had nothing."""
        self._has_engine = False
        for entry in self:
            if not entry.is_sent:
                continue
            entry.is_sent = False
            if loss.ids_in_step and entry.id not in loss.ids_in_step:
                continue
            if loss.is_from_outside:
                entry.kills += 1
            else:
                entry.deaths += 1
            if entry.deaths >= MAX_DEATHS or entry.kills >= MAX_KILLS:
                num_engines = entry.deaths + entry.kills
                words = f"{num_engines} engines in a row died while they computed this request"
                self.end(entry, "error", words)

    def deliver(self, output: SequenceOutput, now_s: float) -> None:
        """Book what the engine sent, at `now_s` of a clock that does not jump."""
        entry = self._entries.get(output.id)
        if entry is None:
            return  # cancelled while this was on its way
        was_suspect = _is_suspect(entry)
        entry.deaths = entry.kills = 0
        entry.receive(output)
        if output.token_ids:
            if entry.last_token_s is not None:
                # Tokens of several steps in one message: each took its share of the time.
                count = len(output.token_ids)
                self._record.inter_token_s.observe((now_s - entry.last_token_s) / count, count)
            entry.last_token_s = now_s
            self._backlog.started(entry.id)
        if output.finish_reason is not None:
            self._forget(entry)
        if was_suspect:
            self._send_due()

    def _forget(self, entry: JournalEntry) -> bool:
        """Take an ended sequence out; False when it was not in."""
        was_there = self._entries.pop(entry.id, None) is not None
        if was_there:
            self._backlog.ended(entry.id)
        if not self._entries:
            self.nothing.set()
        return was_there

    def _send_due(self) -> None:
        """Give the engine what it does not have yet: everything, or the first suspect."""
        if not self._has_engine:
            return  # `engine_ready` sends what is due then
        due = [entry for entry in self if not entry.is_sent]
        suspects = [entry for entry in self if _is_suspect(entry)]
        if suspects:
            is_testing = any(entry.is_sent for entry in suspects)
            due = [] if is_testing else suspects[:1]
        unsendable: list[tuple[JournalEntry, str]] = []
        for entry in due:
            try:
                self._send(entry.to_submit())
                self._record.num_resumed += entry.was_sent
                entry.is_sent = entry.was_sent = True
            except MessageTooLargeError as error:
                unsendable.append((entry, str(error)))
        for entry, words in unsendable:
            self.end(entry, "error", words)


def _is_suspect(entry: JournalEntry) -> bool:
    return entry.deaths + entry.kills >= SUSPECT_DEATHS
