"""An engine that says what the test tells it to, with the real one's manners: outputs that
nobody has read yet are merged, and nothing comes after a cancel."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from service.client import EngineState
from service.engine.explain_messages import (
    Explained,
    ExplainPart,
    ExplainWish,
    Sight,
)
from service.engine.messages import EngineStats, ModelInfo, SequenceOutput, TokenLogprob
from service.engine_record import EngineRecord
from service.explanations import Explanation, Explanations
from service.health import EngineHealth
from service.journal import SequenceRequest

CONTEXT_LENGTH = 256
VOCAB_SIZE = 300

INFO = ModelInfo(
    family="vitrine",
    num_parameters=1234,
    dtype="float32",
    device="cpu",
    vocab_size=VOCAB_SIZE,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=32,
    context_length=CONTEXT_LENGTH,
    eos_token_ids=[0],
    block_size=16,
    num_blocks=64,
    kv_cache_bytes=65536,
    weight_bytes=4936,
    load_s=0.5,
    torch_version="0",
    threads=1,
    deterministic=True,
    attention_backend="reference",
)


@dataclass
class FakeStream:
    """One sequence; `give` and `fail` are the engine's side."""

    request: SequenceRequest
    cancelled: bool = False
    num_reads: int = 0
    _pending: SequenceOutput | Exception | None = None
    taken: asyncio.Event = field(default_factory=asyncio.Event)  # or nobody will take it
    _news: asyncio.Event | None = None

    num_received: int = 0

    def give(
        self,
        *token_ids: int,
        finish: str | None = None,
        stop_token_id: int | None = None,
        error: str | None = None,
        is_grammar_error: bool = False,
        queue_s: float = 0.25,
        prefill_s: float = 0.125,
    ) -> None:
        if self.cancelled:
            return
        before = self._pending
        assert not isinstance(before, Exception)
        assert before is None or before.finish_reason is None
        ids = [*(before.token_ids if before else []), *token_ids]
        logprobs = None
        if (count := self.request.sampling.logprobs) is not None:
            logprobs = [
                TokenLogprob(i, -0.5, 1, [(j, -1.0 - j) for j in range(count)]) for i in ids
            ]
        self.num_received += len(token_ids)
        self._pending = SequenceOutput(
            id=0,
            token_ids=ids,
            logprobs=logprobs,
            finish_reason=finish,  # type: ignore[arg-type]
            stop_token_id=stop_token_id,
            error=error,
            is_grammar_error=is_grammar_error,
            cached_prompt_tokens=1,
            queue_s=queue_s,
            prefill_s=prefill_s,
            explained=self._explained(len(ids)),
        )
        self._tell()

    def _explained(self, count: int) -> list[Sight] | None:
        """Every token looked at position 0, and each head at its own number."""
        if (heads := self.request.explain) is None:
            return None
        places, weights = [0, 1, *[-1] * 6], [0.75, 0.25, *[0.0] * 6]
        for _, head in heads:
            places += [head, *[-1] * 7]
            weights += [1.0, *[0.0] * 7]
        arrays = array("i", places), array("d", weights), array("i", range(5))
        logprobs = array("d", [-1.0 - j for j in range(5)])
        return [Sight(*(one.tobytes() for one in (*arrays, logprobs)))] * count

    def fail(self, error: Exception) -> None:
        self._pending = error
        self._tell()

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()

    def notify(self, news: asyncio.Event) -> None:
        self._news = news
        if self._pending is not None:
            news.set()

    def take(self) -> SequenceOutput | None:
        output, self._pending = self._pending, None
        if output is not None:
            self.num_reads += 1
            self.taken.set()
        if isinstance(output, Exception):
            raise output
        return output

    def cancel(self) -> None:
        self.cancelled = True
        self.taken.set()


Script = Callable[[FakeStream], None]


def say(*token_ids: int, finish: str = "length") -> Script:
    """Give these tokens one by one, then the end; each after the last one was read."""

    def script(stream: FakeStream) -> None:
        async def run() -> None:
            for token_id in token_ids:
                stream.give(token_id)
                await stream.taken.wait()
                stream.taken.clear()
                if stream.cancelled:
                    return
            stream.give(finish=finish)

        tasks.add(task := asyncio.create_task(run()))
        task.add_done_callback(tasks.discard)

    return script


tasks: set[asyncio.Task[None]] = set()  # asyncio keeps only weak references


def stay_silent(stream: FakeStream) -> None:
    """Give nothing: the test does."""


class FakeEngine:
    def __init__(self, script: Script = stay_silent) -> None:
        self.sent_to_guest: list[object] = []
        self.script = script
        self.info: ModelInfo | None = INFO
        self.stats = EngineStats(num_running=3, total_blocks=64, free_blocks=60, cached_blocks=4)
        self.state: EngineState = "idle"
        self.state_reason = ""
        self.refuse: Exception | None = None
        self.record = EngineRecord()
        self.streams: list[FakeStream] = []
        self.requests: list[SequenceRequest] = []
        self.guests = Explanations(self.sent_to_guest.append)
        self.guests.engine_ready()

    @property
    def health(self) -> EngineHealth:
        return EngineHealth(self.state)

    def submit(self, requests: list[SequenceRequest], timeout_s: float) -> list[FakeStream]:
        if self.refuse is not None:
            raise self.refuse
        streams = [FakeStream(request) for request in requests]
        self.requests += requests
        self.streams += streams
        for stream in streams:
            self.script(stream)
        return streams

    def explain(self, token_ids: list[int], wish: ExplainWish, timeout_s: float) -> Explanation:
        if self.refuse is not None:
            raise self.refuse
        return self.guests.add(token_ids, wish)

    def answer(self, message: Explained | ExplainPart) -> None:
        """What the real engine would say of an explanation."""
        if isinstance(message, ExplainPart):
            self.guests.take_part(message)
        else:
            self.guests.take_answer(message)
