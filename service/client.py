"""The API's side of the engine: the journal of requests in flight, and supervision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from model.sampling_params import SamplingParams
from service.engine.messages import EngineStats, ModelInfo, SequenceOutput

EngineState = Literal["starting", "idle", "busy", "stalled", "restarting", "draining", "failed"]


class QueueFullError(Exception):
    """No room for another request now; `retry_after_s` is when there may be."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailableError(Exception):
    """The engine is starting, draining or failed; the message says which."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NeverFitsError(ValueError):
    """Prompt and max_tokens exceed the context or the KV cache; the message has the numbers."""


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One continuation to run."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0


class TokenStream(Protocol):
    """The outputs of one sequence, as the API reads them."""

    async def next(self) -> SequenceOutput:
        """Everything that came since the last call, merged into one output; waits while
        there is nothing. The output with a `finish_reason` is the last."""
        ...

    def cancel(self) -> None:
        """Stop generating and free its blocks. Harmless when already finished."""
        ...


class Engine(Protocol):
    """What the routes see of the engine; `EngineClient` is the real one."""

    @property
    def info(self) -> ModelInfo | None:
        """None until the model is loaded."""
        ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def state(self) -> EngineState: ...

    @property
    def state_reason(self) -> str:
        """Why the engine cannot take a request now, in words; empty when it can."""
        ...

    def submit(self, requests: list[SequenceRequest]) -> list[TokenStream]:
        """Admit all of them or none.

        Raises `QueueFullError`, `EngineUnavailableError` or `NeverFitsError`.
        """
        ...
