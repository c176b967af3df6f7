"""What can be said of the engine from outside: its state, and why it is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

EngineState = Literal[
    "starting",  # loading the model for the first time
    "idle",  # can take a request, has none
    "busy",  # can take a request, has some
    "stalled",  # was not heard for half of the time after which it is taken for dead
    "restarting",  # died or stalled, and is being replaced
    "crash-loop",  # its replacements die too: waiting longer each time before the next
    "draining",  # the server was told to end; what runs may finish
    "stopped",  # the engine process is ended
    "failed",  # the engine cannot start at all, and the server ends
]
STATES: tuple[EngineState, ...] = get_args(EngineState)

# Why an engine was replaced.
Cause = Literal["exit", "stall", "protocol", "start"]
CAUSES: tuple[Cause, ...] = get_args(Cause)


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """One look at the engine."""

    state: EngineState
    heartbeat_age_s: float = 0.0  # since the engine was last heard
    restarts: Mapping[Cause, int] = field(default_factory=dict)  # replacements so far, by cause
    # What was admitted and waits for its first token, and its prompts and max_tokens together.
    queue_requests: int = 0
    queue_tokens: int = 0
    pid: int | None = None  # of its process; None while there is none
