"""Keeps an engine process running: starts it, hears its heart, replaces it, ends it.

**Slow or stalled?** Whatever the engine sends is a sign of life: an output after each step,
and inside a long step a `Progress` between layers, at most every half second, sent by the
thread that computes. A thread of its own for the heartbeat would go on beating while the
computing one hangs. So a prefill of a minute beats once a layer and is left alone, and a
process that is stopped, dead-locked or stuck in a kernel falls silent and is replaced after
`stall_s`. What beats must take less than `stall_s`: one layer of one step.

**The standby.** Of the two seconds that a new engine takes, more than one goes into importing
torch. A second process that has done so and holds no weights waits for its turn.

**Crash loop.** Engines that die before they were ready, or soon after without having computed
anything, get their successors later each time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from service.engine.explain_messages import Explained, ExplainPart
from service.engine.messages import (
    EngineConfig,
    Fatal,
    Measured,
    ModelInfo,
    Ready,
    Shutdown,
    StartFailed,
    StepOutput,
    ToEngine,
    encode,
    from_engine_decoder,
)
from service.engine_link import EngineLink
from service.engine_process import EngineProcess
from service.health import Cause
from service.in_flight import Loss
from service.own_core import OwnCore

log = logging.getLogger("vitrine.engine")

Phase = Literal["starting", "ready", "restarting", "crash-loop", "stopped", "failed"]

# How late a stall is noticed, at most; and a death, where the engine left somebody behind who holds
# its end of the socket. Any other death closes it and is noticed at once.
LOOK_S = 0.05
LAST_WORDS_S = 0.02  # for what a dead engine's socket still holds
EXIT_S = 5.0  # for an engine that closed its socket to be gone; with ranks it waits for theirs
# Loading has long parts that cannot beat: a library on a cold disk, the memory of the cache.
START_SILENCE = 10  # times stall_s
# A life shorter than this in which nothing was computed was fruitless.
SHORT_LIFE_S = 10.0
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
END_GRACE_S = 2.0


class Listener(Protocol):
    """Whom the supervisor tells what happens; never called after `stop`."""

    def engine_ready(self) -> None: ...

    def engine_stepped(self, step: StepOutput) -> None: ...

    def engine_explained(self, message: ExplainPart | Explained) -> None: ...
    def engine_measured(self, measured: Measured) -> None:
        """What the machine can do; once."""
        ...

    def engine_lost(self, loss: Loss) -> None:
        """The engine that was ready, or was about to be, is gone."""
        ...

    def engine_failed(self, reason: str) -> None:
        """There will be no engine at all."""
        ...


@dataclass(frozen=True, slots=True)
class Death:
    """How an engine's life ended. `words` may be shown to clients: no path is in them."""

    cause: Cause
    words: str
    details: str = ""  # for the log
    is_from_outside: bool = False


class Supervisor:
    """One engine process after another, on the event loop that `start` was called in."""

    def __init__(self, listener: Listener, *, stall_s: float, standby: bool) -> None:
        self.stall_s = stall_s
        self.phase: Phase = "starting"
        self.restarts: Counter[Cause] = Counter()
        self.info: ModelInfo | None = None
        self.failure = ""  # why there will be no engine; empty while there may
        self.death: Death | None = None  # of the last engine
        self._listener = listener
        self._wants_standby = standby
        self._engine: EngineProcess | None = None
        self._standby: EngineProcess | None = None
        self._link: EngineLink | None = None
        self._own_core = OwnCore()
        self._task: asyncio.Task[None] | None = None
        self._heard_at = time.monotonic()
        self._began_at = time.monotonic()  # this life; in the future while it is put off
        self._start_s = 0.0  # what the last engine took from there to be ready
        self._fruitless = 0  # lives in a row
        self._is_measured = False  # what the machine can do
        # Of this life:
        self._ready_at: float | None = None
        self._computed = False
        self._last_words: Fatal | None = None
        self._verdict: asyncio.Future[Death | None] | None = None  # None: it hung up

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine was last heard."""
        return time.monotonic() - self._heard_at

    @property
    def pid(self) -> int | None:
        """Of the engine process; None while there is none."""
        return None if self._engine is None else self._engine.process.pid

    @property
    def is_silent(self) -> bool:
        """Whether an engine that was ready has not been heard for half of `stall_s`."""
        return self.phase == "ready" and self.heartbeat_age_s > self.stall_s / 2

    @property
    def next_try_s(self) -> float:
        """Seconds until the next engine is started, in a crash loop."""
        return max(0.0, self._began_at - time.monotonic())

    @property
    def wait_s(self) -> float:
        """How long until there is an engine, if the next one takes as long as the last did."""
        if self.is_silent:  # it is given up first
            return max(0.0, self.stall_s - self.heartbeat_age_s) + self._start_s
        if self.phase == "ready":
            return 0.0
        return max(0.0, self._start_s - (time.monotonic() - self._began_at))

    def spawn(self) -> None:
        """Start the engine process; it loads libraries while the caller goes on."""
        self._began_at = time.monotonic()
        self._engine = self._spawn()

    def start(self, config: EngineConfig) -> None:
        """Begin supervising; needs a running event loop."""
        self._task = asyncio.create_task(self._supervise(config), name="engine-supervisor")
        self._task.add_done_callback(self._broke_off)

    def send(self, message: ToEngine) -> None:
        """Queue a message to the engine that runs. Raises `MessageTooLargeError`."""
        if self._link is not None:
            self._link.send(encode(message))

    def fail(self, reason: str) -> None:
        """There will be no engine; `reason` is for the operator."""
        self.phase, self.failure = "failed", reason
        self._listener.engine_failed(reason)

    async def stop(self) -> None:
        """End all processes."""
        # One that is still loading does not read messages; there is nothing to lose in it.
        grace_s = END_GRACE_S if self.phase == "ready" else 0.0
        self.send(Shutdown())
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        standby, self._standby = self._standby, None
        if standby is not None:
            await asyncio.to_thread(standby.end, 0.0)
        await self._end_engine(grace_s)
        self._own_core.leave_none()
        self.phase = "stopped"

    def _broke_off(self, task: asyncio.Task[None]) -> None:
        """A server without supervision would accept requests that nobody answers."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("supervision of the engine broke off", exc_info=error)
            self.fail(f"supervision broke off: {type(error).__name__}: {error}")

    async def _supervise(self, config: EngineConfig) -> None:
        while True:
            death = await self._live(config)
            self.death = death
            if self.phase != "failed":
                self.phase = "restarting"
            ids_in_step = self._engine.ids_in_step if self._engine is not None else frozenset()
            self._listener.engine_lost(Loss(ids_in_step, death.is_from_outside))
            await self._end_engine(grace_s=0.0)
            if self.failure:
                return
            if self.info is not None:
                config = msgspec.structs.replace(config, row_padding=self.info.row_padding)
            if self._is_measured:
                config = msgspec.structs.replace(config, measure_roofline=False)
            await self._before_the_next(death)

    async def _before_the_next(self, death: Death) -> None:
        """Count it, and wait if it is one of many."""
        self.restarts[death.cause] += 1
        now = time.monotonic()
        is_short = self._ready_at is None or now - self._ready_at < SHORT_LIFE_S
        self._fruitless = self._fruitless + 1 if is_short and not self._computed else 0
        backoff_s = 0.0
        if self._fruitless > 1:
            self.phase = "crash-loop"
            backoff_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(self._fruitless - 2, 10))
        self._began_at = now + backoff_s
        log.error(
            "the engine %s%s; replacing it%s",
            death.words,
            f" ({death.details})" if death.details else "",
            f" in {backoff_s:g} s" if backoff_s else "",
        )
        await asyncio.sleep(backoff_s)

    async def _live(self, config: EngineConfig) -> Death:
        """Configure an engine and hear it until it dies or stalls; says which."""
        self._ready_at, self._computed, self._last_words = None, False, None
        verdict: asyncio.Future[Death | None] = asyncio.get_running_loop().create_future()
        self._verdict = verdict
        try:
            engine = self._engine = await self._next_engine()
            link = self._link = await engine.link(self)
        except OSError as error:
            return Death("start", "could not be started", str(error))
        self._heard_at = time.monotonic()
        link.send(encode(config))
        try:
            while True:
                is_alive = engine.is_alive  # asked before: what a dead one said counts
                await asyncio.wait([verdict], timeout=LOOK_S if is_alive else LAST_WORDS_S)
                if verdict.done() or not is_alive:
                    death = verdict.result() if verdict.done() else None
                    return death or await self._exit_of(engine)
                limit_s = self.stall_s * (START_SILENCE if self._ready_at is None else 1)
                if self.heartbeat_age_s > limit_s:
                    return Death("stall", f"was not heard for {self.heartbeat_age_s:.1f} s")
        finally:
            verdict.cancel()  # what it still says is not heard; a verdict that was given stays

    def heard(self, message: bytes) -> None:
        """Of the link alone, like `hung_up`."""
        if self._verdict is None or self._verdict.done():
            return
        try:
            death = self._handle(message)
        except msgspec.MsgspecError as error:
            death = Death("protocol", "sent a message that breaks the schema", str(error))
        except Exception as error:  # noqa: BLE001 - it is the supervision that breaks off, loudly
            self._verdict.set_exception(error)
            return
        if death is not None:
            self._verdict.set_result(death)

    def hung_up(self, error: str) -> None:
        if self._verdict is not None and not self._verdict.done():
            broke = Death("protocol", "sent a message that breaks the schema", error)
            self._verdict.set_result(broke if error else None)

    @property
    def _is_crowded(self) -> bool:
        """Whether the engine computes on all cores there are."""
        info = self.info
        if info is None or info.device != "cpu":
            return False
        return info.threads >= self._own_core.count > 1

    def _spawn(self) -> EngineProcess:
        self._own_core.leave_none()
        return EngineProcess.spawn()

    async def _next_engine(self) -> EngineProcess:
        """The one spawned ahead, the standby, or a new one; never a dead one."""
        ahead, self._engine, self._standby = self._engine or self._standby, None, None
        if ahead is not None and not ahead.is_alive:
            await asyncio.to_thread(ahead.end, 0.0)
            ahead = None
        return ahead or self._spawn()

    def _handle(self, data: bytes) -> Death | None:
        message = from_engine_decoder.decode(data)
        self._heard_at = time.monotonic()
        if isinstance(message, StepOutput):
            self._computed = self._computed or bool(message.outputs)
            if self._is_crowded:
                self._own_core.leave(message.cpu)
            self._listener.engine_stepped(message)
        elif isinstance(message, ExplainPart | Explained):
            self._computed = True
            self._listener.engine_explained(message)
        elif isinstance(message, Ready):
            self._is_ready(message)
        elif isinstance(message, StartFailed):
            # What cannot be loaded the first time is the operator's to mend. What could be
            # loaded before may be loaded again: memory may be short only now.
            if self.info is None:
                self.fail(message.reason)
            return Death("start", "could not load the model again", message.reason)
        elif isinstance(message, Measured):
            self._is_measured = True
            self._listener.engine_measured(message)
        elif isinstance(message, Fatal):
            self._last_words = message
        return None

    def _is_ready(self, message: Ready) -> None:
        self.info = message.info
        self.phase = "ready"
        self._ready_at = self._heard_at
        self._start_s = self._heard_at - self._began_at
        self._listener.engine_ready()
        if self._wants_standby and self._standby is None:
            try:
                self._standby = self._spawn()
            except OSError as error:
                log.warning("no standby: %s", error)

    async def _exit_of(self, engine: EngineProcess) -> Death:
        await asyncio.to_thread(engine.wait, EXIT_S)  # its socket closes a moment before
        if self._last_words is None:
            return Death("exit", engine.ending, is_from_outside=engine.is_killed_from_outside)
        words = f"ended with {self._last_words.kind}"
        return Death("exit", words, self._last_words.message)

    async def _end_engine(self, grace_s: float) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.end, grace_s)
            self._engine = None
        if self._link is not None:
            self._link.close()
            self._link = None
