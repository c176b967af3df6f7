"""What the routes share, handed to them once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model.tokenizer import Tokenizer
from service.api.generation import ActiveGenerations
from service.api.limits import ApiLimits
from service.api.recent import RecentRequests
from service.api.resumable import ResumableStreams
from service.api.structured_output import Checker
from service.chat_renderer import ChatRenderer
from service.client import Engine, EngineUnavailableError
from service.engine.messages import ModelInfo
from service.metric_collectors import DeviceCollector
from service.metric_recording import Metrics

RETRY_AFTER_START_S = 2.0  # a guess at how long loading still takes


@dataclass(frozen=True, slots=True)
class ApiContext:
    """One server's parts, as the API sees them."""

    limits: ApiLimits
    engine: Engine
    tokenizer: Callable[[], Tokenizer | None]  # None while it is being loaded
    model_name: str
    metrics: Metrics
    devices: DeviceCollector
    generations: ActiveGenerations
    chat_renderer: Callable[[], ChatRenderer | None]  # None: the model has no chat template
    resumable: ResumableStreams
    recent: RecentRequests
    grammars: Checker | None  # None: the library is not installed

    def loaded(self) -> tuple[Tokenizer, ModelInfo]:
        """The tokenizer and what the model is.

        Raises `EngineUnavailableError` while either is missing.
        """
        tokenizer, info = self.tokenizer(), self.engine.info
        if info is None or tokenizer is None:
            raise EngineUnavailableError(self.unready_reason(), RETRY_AFTER_START_S)
        return tokenizer, info

    def unready_reason(self) -> str:
        """Why no request can be taken now; empty when one can."""
        if self.engine.state not in ("idle", "busy"):
            return self.engine.state_reason or f"the engine is {self.engine.state}"
        if self.engine.info is None:
            return self.engine.state_reason or "the model is being loaded"
        if self.tokenizer() is None:
            return "the tokenizer is being loaded"
        return ""
