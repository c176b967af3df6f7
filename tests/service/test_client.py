"""The engine client without an engine: what it sends, whom it suspects, what it refuses.

The other side of the socket is played by the test; tests/service/test_server.py has the real one.
"""

from __future__ import annotations

import asyncio

import pytest

from model.sampling_params import SamplingParams
from service.backlog import Backlog
from service.client import (
    EngineClient,
    EngineUnavailableError,
    NeverFitsError,
    QueueFullError,
)
from service.engine.messages import (
    Abort,
    EngineStats,
    ModelInfo,
    Ready,
    SequenceOutput,
    StepOutput,
    Submit,
    encoder,
    to_engine_decoder,
)
from service.in_flight import NOT_KNOWN
from service.journal import JournalEntry, SequenceRequest
from tests.api.test_quotas import Clock

INFO = ModelInfo(
    family="llama",
    num_parameters=1,
    dtype="float32",
    device="cpu",
    vocab_size=100,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    hidden_size=16,
    context_length=64,
    eos_token_ids=[0],
    block_size=16,
    num_blocks=3,
    kv_cache_bytes=1,
    weight_bytes=1,
    load_s=1.0,
    torch_version="2",
    threads=1,
    deterministic=True,
    attention_backend="cpu-torch",
)


class PlayedEngine:
    """Takes what the client sends, and dies and speaks as told."""

    def __init__(self, max_in_flight: int = 8) -> None:
        self.client = EngineClient(max_in_flight=max_in_flight, stall_s=30.0)
        self.inbox: list[Submit | Abort] = []
        self.supervisor = self.client._supervisor
        self.supervisor._link = self  # type: ignore[assignment]

    def send(self, data: bytes) -> None:
        message = to_engine_decoder.decode(data)
        assert isinstance(message, Submit | Abort)
        self.inbox.append(message)

    def take(self) -> list[int]:
        """Ids submitted since the last call."""
        ids = [message.id for message in self.inbox if isinstance(message, Submit)]
        self.inbox.clear()
        return ids

    def starts(self) -> None:
        self.supervisor._handle(encoder.encode(Ready(INFO)))

    def dies(self) -> None:
        self.supervisor.phase = "restarting"
        self.client.engine_lost(NOT_KNOWN)
        self.inbox.clear()

    def says(self, *outputs: SequenceOutput) -> None:
        self.supervisor._handle(encoder.encode(StepOutput(list(outputs), EngineStats())))

    def submit(self, count: int = 1, timeout_s: float = 60.0) -> list[JournalEntry]:
        request = SequenceRequest([1, 2, 3], SamplingParams(max_tokens=9, seed=5))
        streams = self.client.submit([request] * count, timeout_s)
        assert all(isinstance(stream, JournalEntry) for stream in streams)
        return streams  # type: ignore[return-value]


@pytest.fixture
def engine() -> PlayedEngine:
    played = PlayedEngine()
    played.starts()
    return played


async def test_a_sequence_goes_on_with_the_tokens_it_has(engine: PlayedEngine) -> None:
    (entry,) = engine.submit()
    engine.says(SequenceOutput(entry.id, [7]))
    engine.says(SequenceOutput(entry.id, [8]))
    engine.dies()
    engine.starts()
    (again,) = engine.inbox
    assert isinstance(again, Submit)
    assert (again.prompt_token_ids, again.output_token_ids) == ([1, 2, 3], [7, 8])
    assert again.sampling.seed == 5
    engine.says(SequenceOutput(entry.id, [9], finish_reason="length"))
    output = entry.take()
    assert (output.token_ids, output.finish_reason) == ([7, 8, 9], "length")
    assert engine.client.in_flight == 0


async def test_only_the_request_that_kills_engines_fails(engine: PlayedEngine) -> None:
    """Two deaths make suspects; each is tried alone; the third death shows the killer."""
    first, killer, third = engine.submit(3)
    engine.dies()
    engine.starts()
    assert engine.take() == [first.id, killer.id, third.id], "one death makes nobody a suspect"
    engine.dies()
    engine.starts()
    assert engine.take() == [first.id], "suspects come one at a time"
    engine.says(SequenceOutput(first.id, [7]))
    assert engine.take() == [killer.id]
    engine.dies()
    assert killer.take().finish_reason == "error"
    engine.starts()
    assert engine.take() == [third.id], "still a suspect, still alone"
    engine.says(SequenceOutput(third.id, [7]))
    assert engine.take() == [first.id]
    for entry in (first, third):
        engine.says(SequenceOutput(entry.id, [8], finish_reason="length"))
        assert entry.take().finish_reason == "length"


async def test_engines_that_die_while_loading_blame_nobody(engine: PlayedEngine) -> None:
    (entry,) = engine.submit()
    engine.dies()
    for _ in range(5):
        engine.dies()  # before Ready: nothing had been sent
    engine.starts()
    assert engine.take() == [entry.id]
    engine.says(SequenceOutput(entry.id, [7], finish_reason="length"))
    assert entry.take().finish_reason == "length"


async def test_a_suspect_that_is_cancelled_lets_the_next_one_go(engine: PlayedEngine) -> None:
    first, second = engine.submit(2)
    engine.dies()
    engine.starts()
    engine.dies()
    engine.starts()
    engine.take()
    first.cancel()
    assert engine.take() == [second.id]


async def test_new_requests_wait_for_the_suspects_and_then_run(engine: PlayedEngine) -> None:
    (suspect,) = engine.submit()
    for _ in range(2):
        engine.dies()
        engine.starts()
    engine.take()
    (new,) = engine.submit()
    assert engine.take() == []
    engine.says(SequenceOutput(suspect.id, [7]))
    assert engine.take() == [new.id]


async def test_cancelling_tells_the_engine_once(engine: PlayedEngine) -> None:
    (entry,) = engine.submit()
    entry.cancel()
    entry.cancel()
    assert engine.inbox[1:] == [Abort(entry.id)]
    engine.says(SequenceOutput(entry.id, [7]))  # was on its way: nobody is there any more
    assert engine.client.in_flight == 0


async def test_a_replacement_that_takes_longer_than_the_request_may_is_a_503(
    engine: PlayedEngine,
) -> None:
    engine.supervisor._start_s = 20.0
    engine.supervisor._began_at = asyncio.get_running_loop().time()
    engine.dies()
    with pytest.raises(EngineUnavailableError, match="being replaced") as refused:
        engine.submit(timeout_s=5.0)
    assert 15 < refused.value.retry_after_s <= 20
    (entry,) = engine.submit(timeout_s=60.0)
    engine.starts()
    assert engine.take() == [entry.id]


async def test_a_full_queue_is_a_429_and_what_never_fits_is_not(engine: PlayedEngine) -> None:
    engine.submit(8)
    with pytest.raises(QueueFullError, match=r"8 continuations are in flight .* limit is 8"):
        engine.submit()
    with pytest.raises(NeverFitsError, match=r"17 continuations .* 16 at most") as refused:
        engine.submit(17)
    assert refused.value.field == "n"


async def test_an_empty_house_takes_every_continuation_of_one_request(
    engine: PlayedEngine,
) -> None:
    """`n` is 1 .. 16 for every server, however small its queue."""
    entries = engine.submit(16)
    with pytest.raises(QueueFullError, match="16 continuations are in flight"):
        engine.submit()
    for entry in entries:
        entry.cancel()
    assert engine.submit()


async def test_the_numbers_of_what_does_not_fit(engine: PlayedEngine) -> None:
    long = SequenceRequest([1] * 60, SamplingParams(max_tokens=5))
    with pytest.raises(NeverFitsError, match="65, and the context length is 64"):
        engine.client.submit([long], 60.0)
    big = SequenceRequest([1] * 40, SamplingParams(max_tokens=9))
    with pytest.raises(NeverFitsError, match="49, and the KV cache holds 48"):
        engine.client.submit([big], 60.0)


async def test_what_drains_too_long_ends_as_cancelled(engine: PlayedEngine) -> None:
    (entry,) = engine.submit()
    engine.says(SequenceOutput(entry.id, [7]))
    await engine.client.drain(grace_s=0.01)
    output = entry.take()
    assert (output.token_ids, output.finish_reason) == ([7], "cancelled")
    assert isinstance(engine.inbox[-1], Abort)
    with pytest.raises(EngineUnavailableError, match="shutting down"):
        engine.submit()


async def test_tokens_that_wait_are_bounded(engine: PlayedEngine) -> None:
    """A sequence counts as its 3 + 9 tokens until its first token is there."""
    engine.client.max_queue_tokens = 30
    first, second = engine.submit(2)
    with pytest.raises(QueueFullError, match=r"24 tokens wait .* has 12 .* the limit is 30") as no:
        engine.submit()
    assert no.value.retry_after_s >= 1
    engine.says(SequenceOutput(first.id, [7]))
    (third,) = engine.submit()
    with pytest.raises(QueueFullError):
        engine.submit()
    second.cancel()
    third.cancel()
    assert len(engine.submit(3)) == 3, "into an empty queue goes whatever fits the model"


async def test_a_full_queue_tells_the_measured_wait(engine: PlayedEngine) -> None:
    clock = Clock()
    engine.client._backlog = engine.client._in_flight._backlog = Backlog(clock)
    entries = engine.submit(8)
    for entry in entries[:4]:
        clock.now_s += 5
        engine.says(SequenceOutput(entry.id, [7], finish_reason="length"))
    engine.submit(4)
    with pytest.raises(QueueFullError) as refused:
        engine.submit(3)
    assert refused.value.retry_after_s == pytest.approx(15)
