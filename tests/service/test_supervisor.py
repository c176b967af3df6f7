"""The supervisor with played processes: what it takes for a death, and what it does then."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from model.sampling_params import SamplingParams
from service import supervisor as module
from service.engine import recorder
from service.engine.messages import (
    MAX_MESSAGE_BYTES,
    EngineConfig,
    EngineStats,
    Fatal,
    FromEngine,
    Measured,
    MessageTooLargeError,
    Progress,
    Ready,
    SequenceOutput,
    StartFailed,
    StepOutput,
    Submit,
    encode,
    to_engine_decoder,
)
from service.engine.recorder import Recorder
from service.engine_link import LinkListener
from service.in_flight import Loss
from service.supervisor import Supervisor
from tests.service.test_client import INFO

READY = Ready(msgspec.structs.replace(INFO, row_padding=(2, 1)))
OUTPUT = StepOutput([SequenceOutput(1, [7])], EngineStats())
IDLE = StepOutput([], EngineStats())


class PlayedProcess:
    """Says these and dies, or stays."""

    ids_in_step = frozenset({3})
    ending = "was killed by SIGKILL"
    is_killed_from_outside = True

    def __init__(self, *said: FromEngine | bytes, stays: bool = False) -> None:
        self.said = [one if isinstance(one, bytes) else encode(one) for one in said]
        self.stays = stays
        self.configs: list[EngineConfig] = []

    @property
    def is_alive(self) -> bool:
        return self.stays or bool(self.said)

    async def link(self, listener: LinkListener) -> PlayedProcess:
        self.listener = listener
        self.saying = asyncio.create_task(self.say())
        return self

    def send(self, data: bytes) -> None:
        message = to_engine_decoder.decode(data)
        if isinstance(message, EngineConfig):
            self.configs.append(message)

    async def say(self) -> None:
        while self.said:
            await self.pause()
            self.listener.heard(self.said.pop(0))
        if not self.stays:
            self.listener.hung_up("")

    async def pause(self) -> None:
        await asyncio.sleep(0)

    def close(self) -> None:
        self.saying.cancel()

    def wait(self, limit_s: float) -> None:
        pass

    def end(self, grace_s: float) -> None:
        self.stays = False


@dataclass
class Played:
    """A supervisor over a row of processes, and what its listener was told."""

    processes: list[PlayedProcess | OSError]
    stall_s: float = 30.0
    told: list[str] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.used: list[PlayedProcess] = []
        self.supervisor = Supervisor(self, stall_s=self.stall_s, standby=False)

    def engine_ready(self) -> None:
        self.told.append("ready")

    def engine_stepped(self, step: StepOutput) -> None:
        self.told.append("output" if step.outputs else "beat")

    def engine_measured(self, measured: Measured) -> None:
        self.told.append("measured")

    def engine_lost(self, loss: Loss) -> None:
        self.told.append("lost")
        self.losses.append(loss)

    def engine_failed(self, reason: str) -> None:
        self.told.append(f"failed: {reason}")

    def spawn(self) -> PlayedProcess:
        process = self.processes.pop(0)
        if isinstance(process, OSError):
            raise process
        self.used.append(process)
        return process

    async def run(self, *, ready: int) -> None:
        """Until so many engines were ready, or there will be none."""
        self.supervisor.start(EngineConfig("model"))
        async with asyncio.timeout(20):
            while self.told.count("ready") < ready and not self.supervisor.failure:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    @property
    def restarts(self) -> dict[str, int]:
        return dict(self.supervisor.restarts)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Played]]:
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 0.02)

    class Here(Played):
        def __post_init__(self) -> None:
            super().__post_init__()
            monkeypatch.setattr(module.EngineProcess, "spawn", self.spawn)

    return Here  # type: ignore[return-value]


async def test_nonsense_is_a_death(play: type[Played]) -> None:
    played = play([PlayedProcess(READY, b"\xc1", stays=True), PlayedProcess(READY, stays=True)])
    await played.run(ready=2)
    assert played.restarts == {"protocol": 1}
    assert played.told == ["ready", "lost", "ready"]


async def test_what_a_dead_engine_still_said_counts(play: type[Played]) -> None:
    dead = PlayedProcess(READY, OUTPUT, OUTPUT)
    played = play([dead, PlayedProcess(READY, stays=True)])
    await played.run(ready=2)
    assert played.told == ["ready", "output", "output", "lost", "ready"]
    assert played.losses == [Loss(frozenset({3}), is_from_outside=True)]


async def test_what_was_measured_is_not_measured_again(play: type[Played]) -> None:
    lives = [
        PlayedProcess(READY),
        PlayedProcess(READY, Measured(1e9, 1e10)),
        PlayedProcess(READY, stays=True),
    ]
    played = play(lives)
    config = EngineConfig("model", measure_roofline=True)
    played.supervisor.start(config)
    async with asyncio.timeout(20):
        while played.told.count("ready") < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert played.told.count("measured") == 1
    asked = [process.configs[0].measure_roofline for process in played.used]
    assert asked == [True, True, False]


async def test_last_words_name_the_exception_and_hide_the_rest(play: type[Played]) -> None:
    dead = PlayedProcess(READY, Fatal("MemoryError", "at /home/somebody"))
    played = play([dead, PlayedProcess(READY, stays=True)])
    await played.run(ready=2)
    assert played.supervisor.death is not None
    assert played.supervisor.death.words == "ended with MemoryError"
    assert not played.losses[0].is_from_outside


async def test_a_model_that_cannot_be_loaded_at_all_ends_it(play: type[Played]) -> None:
    played = play([PlayedProcess(StartFailed("no such file"))])
    await played.run(ready=1)
    assert played.supervisor.failure == "no such file"
    assert "failed: no such file" in played.told


async def test_a_model_that_was_loaded_before_is_tried_again(play: type[Played]) -> None:
    """Memory may be short only now."""
    refused = [PlayedProcess(StartFailed("out of memory")) for _ in range(3)]
    played = play([PlayedProcess(READY, OUTPUT), *refused, PlayedProcess(READY, stays=True)])
    await played.run(ready=2)
    assert not played.supervisor.failure
    assert played.restarts == {"exit": 1, "start": 3}


async def test_a_process_that_cannot_be_made_is_tried_again(play: type[Played]) -> None:
    none_left = OSError("no more processes")
    played = play([PlayedProcess(READY), none_left, none_left, PlayedProcess(READY, stays=True)])
    await played.run(ready=2)
    assert played.restarts == {"exit": 1, "start": 2}


async def test_fruitless_lives_wait_longer_each_time_and_fruit_ends_that(
    play: type[Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note(delay: float) -> None:
        waits.append(delay)
        await sleep(0)

    monkeypatch.setattr(module.asyncio, "sleep", note)
    monkeypatch.setattr(PlayedProcess, "pause", lambda _: sleep(0))
    monkeypatch.setattr(module, "MAX_BACKOFF_S", 0.1)
    fruitless = [PlayedProcess(READY, IDLE) for _ in range(6)]
    fruitful = [PlayedProcess(READY, OUTPUT), PlayedProcess(READY, OUTPUT)]
    played = play([*fruitless, *fruitful, PlayedProcess(READY, stays=True)])
    played.supervisor.start(EngineConfig("model"))
    while played.told.count("ready") < 9:
        await sleep(0.001)
    assert waits == [0.0, 0.02, 0.04, 0.08, 0.1, 0.1, 0.0, 0.0]


async def test_silence_is_a_stall_and_progress_is_none(play: type[Played]) -> None:
    class Slow(PlayedProcess):
        async def pause(self) -> None:
            await asyncio.sleep(0.03)

    slow = Slow(READY, *[Progress(1024, 1.0)] * 10, stays=True)
    played = play([slow, PlayedProcess(READY, stays=True)], stall_s=0.2)
    await played.run(ready=2)
    assert played.restarts == {"stall": 1}
    assert not slow.said, "it was given up while it still beat"


async def test_measured_padding_is_handed_on(play: type[Played]) -> None:
    first, second = PlayedProcess(READY), PlayedProcess(READY, stays=True)
    await play([first, second]).run(ready=2)
    assert first.configs[0].row_padding is None
    assert second.configs[0].row_padding == (2, 1)


def test_a_message_over_the_limit_is_not_sent() -> None:
    submit = Submit(1, [2**30] * (MAX_MESSAGE_BYTES // 5 + 1), SamplingParams())
    with pytest.raises(MessageTooLargeError, match="the limit is 67,108,864"):
        encode(submit)


def test_the_recorder_outlives_its_process(tmp_path: Path) -> None:
    assert recorder.read(tmp_path) == frozenset(), "nothing was recorded"
    recorder.create(tmp_path)
    assert recorder.read(tmp_path) == frozenset()
    step = Recorder(tmp_path)
    step.begin([5, 6, 2**40])
    assert recorder.read(tmp_path) == {5, 6, 2**40}
    step.begin([7])
    assert recorder.read(tmp_path) == {7}
    step.begin(range(recorder.MAX_IDS))
    assert len(recorder.read(tmp_path)) == recorder.MAX_IDS
    step.begin([])
    assert recorder.read(tmp_path) == frozenset()
