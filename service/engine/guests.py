"""The guest of the engine: an explanation, computed a piece at a time in what the streams leave.

Beside streams `guest_pace.py` says when a piece may run. With nothing else to do the guest has the
engine to itself, and gives way between two pieces as soon as a message waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from service.engine.explain_messages import Explain, Explained, ExplainPart, recorded_id
from service.engine.guest_pace import GuestPace
from service.engine.recorder import Recorder

# A guest that is alone lets the API hear of the engine so often.
ALONE_S = 0.1

# Yields after each piece; returns the answer, and has given its parts to the function by then.
Work = Generator[Any, None, Explained]
Begin = Callable[[Explain, Callable[[ExplainPart], None]], Work]


class ExplainRefusedError(ValueError):
    """What was asked for cannot be answered; the message is for the client."""


@dataclass(slots=True)
class Guest:
    """The explanation that is being computed."""

    id: int
    work: Work
    compute_s: float = 0.0


@dataclass(slots=True)
class Guests:
    """Room for one guest. `begin` makes its work, `send` takes what comes of it; without `begin`
    nothing can be explained here."""

    begin: Begin | None
    send: Callable[[ExplainPart | Explained], None]
    recorder: Recorder | None = None
    pace: GuestPace = field(default_factory=GuestPace)
    _guest: Guest | None = None
    _last_step_at: float | None = None  # of an unbroken row of steps

    @property
    def has_work(self) -> bool:
        return self._guest is not None

    def add(self, request: Explain) -> None:
        """Take a guest in. One that comes while another is there is sent away."""
        if self._guest is not None:
            busy = f"explanation {self._guest.id} is being computed"
            self.send(Explained(request.id, error=busy))
            return
        if self.begin is None:
            self.send(Explained(request.id, error="this engine explains nothing"))
            return
        self._guest = Guest(request.id, self.begin(request, self.send))

    def forget(self, explanation_id: int) -> None:
        """Drop it; unknown ids (already finished) are nothing to do."""
        if self._guest is not None and self._guest.id == explanation_id:
            self._guest.work.close()
            self._guest = None

    def after_step(self, *, is_last: bool) -> None:
        """Between two steps: run what fits. `is_last`: no step follows, nobody waits."""
        now = time.monotonic()
        if self._last_step_at is not None:
            self.pace.stepped(now - self._last_step_at)
        self._last_step_at = None if is_last else now
        while self._guest is not None and not is_last and self.pace.allows_piece:
            self.pace.worked(self._run_piece(self._guest))

    def alone(self, is_wanted: Callable[[], bool]) -> None:
        """Work until the guest is done, something else is wanted, or ALONE_S have passed."""
        self._last_step_at = None
        end = time.monotonic() + ALONE_S
        while self._guest is not None and time.monotonic() < end and not is_wanted():
            self.pace.learn(self._run_piece(self._guest))

    def _run_piece(self, guest: Guest) -> float:
        """One piece; how long it took. The guest leaves with its last."""
        began = time.monotonic()
        if self.recorder is not None:
            self.recorder.begin_guest(recorded_id(guest.id))
        answer: Explained | None = None
        try:
            next(guest.work)
        except StopIteration as end:
            answer = end.value
        except ExplainRefusedError as error:
            answer = Explained(guest.id, refusal=str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, it must cost the guest only
            answer = Explained(guest.id, error=f"{type(error).__name__}: {error}")
        if self.recorder is not None:
            self.recorder.end_guest()
        seconds = time.monotonic() - began
        guest.compute_s += seconds
        if answer is not None:
            self._guest = None
            self.send(msgspec.structs.replace(answer, compute_s=guest.compute_s))
        return seconds
