"""The API's side of the engine: the journal of requests in flight, and supervision.

When the engine process dies, another takes its place and the unfinished sequences go on from
where the journal says they were: noise is a function of (seed, position, token), so the
tokens are the ones the first engine would have drawn.

A sequence that two engines in a row died with, without a token from it between, is a suspect:
suspects are given to the next engine one after another, each alone until it shows a token.
The one that a third engine dies with ends with an error, and the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from typing import Literal, Protocol

import msgspec
import zmq.asyncio

from service.backlog import Backlog
from service.engine.messages import (
    Abort,
    EngineConfig,
    EngineStats,
    ModelInfo,
    Ready,
    SequenceOutput,
    Shutdown,
    StartFailed,
    StepOutput,
    ToEngine,
    encoder,
    from_engine_decoder,
)
from service.engine_process import EngineProcess
from service.journal import JournalEntry, SequenceRequest, TokenStream

log = logging.getLogger("vitrine.engine")

EngineState = Literal["starting", "idle", "busy", "stalled", "restarting", "draining", "failed"]

SUSPECT_DEATHS = 2
MAX_DEATHS = 3
# Lives shorter than this, one after another, are a crash loop: wait longer each time.
SHORT_LIFE_S = 10.0
MAX_BACKOFF_S = 30.0


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
    """The request could never run here; the message has the numbers, `field` the culprit."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


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

    def submit(self, requests: list[SequenceRequest], timeout_s: float) -> list[TokenStream]:
        """Admit all of them or none; `timeout_s` is how long they may take.

        Raises `QueueFullError`, `EngineUnavailableError` or `NeverFitsError`.
        """
        ...


class EngineClient:
    """Owns the engine process: starts it, replaces it when it dies or stalls, ends it."""

    def __init__(
        self, *, max_in_flight: int, stall_s: float, max_queue_tokens: int | None = None
    ) -> None:
        self.max_in_flight = max_in_flight
        self.stall_s = stall_s
        self.max_queue_tokens = max_queue_tokens
        self.restarts = 0
        self._ids = itertools.count(1)
        self._journal: dict[int, JournalEntry] = {}
        self._engine: EngineProcess | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._info: ModelInfo | None = None
        self._stats = EngineStats()
        self._ready = False
        self._draining = False
        self._nothing_in_flight = asyncio.Event()
        self._nothing_in_flight.set()
        self._failure = ""
        self._heard_at = time.monotonic()
        self._began_at = time.monotonic()  # this engine, or the wait for it
        self._start_s = 0.0  # what the last engine took from there to its first word
        self._supervisor: asyncio.Task[None] | None = None
        self._backlog = Backlog()
        self.failed = asyncio.Event()  # set when the engine cannot start at all

    @property
    def info(self) -> ModelInfo | None:
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def failure(self) -> str:
        """Why the engine cannot start at all; empty when it can."""
        return self._failure

    @property
    def in_flight(self) -> int:
        """Sequences accepted and not yet ended."""
        return len(self._journal)

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine was last heard."""
        return time.monotonic() - self._heard_at

    @property
    def state(self) -> EngineState:
        if self._draining:
            return "draining"
        if self._failure:
            return "failed"
        if not self._ready:
            return "restarting" if self.restarts else "starting"
        if self.heartbeat_age_s > self.stall_s / 2:
            return "stalled"
        return "busy" if self._journal else "idle"

    @property
    def state_reason(self) -> str:
        return {
            "starting": "the engine is loading the model",
            "restarting": "the engine died and is being replaced",
            "stalled": f"the engine has not been heard for {self.heartbeat_age_s:.1f} s",
            "draining": "the server is shutting down",
            "failed": "the engine cannot start; the server's log says why",
        }.get(self.state, "")

    def submit(self, requests: list[SequenceRequest], timeout_s: float) -> list[TokenStream]:
        self._admit(requests, timeout_s)
        entries = [JournalEntry(next(self._ids), request, self._drop) for request in requests]
        for entry in entries:
            self._journal[entry.id] = entry
            self._backlog.add(entry.id, _num_tokens(entry.request))
            self._nothing_in_flight.clear()
        self._send_due()
        return list(entries)

    def spawn(self) -> None:
        """Start the engine process; it loads libraries while the caller goes on."""
        self._began_at = time.monotonic()
        self._engine = EngineProcess.spawn()

    def start(self, config: EngineConfig) -> None:
        """Begin supervising; needs a running event loop."""
        self._supervisor = asyncio.create_task(self._supervise(config), name="engine-supervisor")
        self._supervisor.add_done_callback(self._supervisor_ended)

    def _supervisor_ended(self, task: asyncio.Task[None]) -> None:
        """A server without supervision would accept requests that nobody answers."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("supervision of the engine broke off", exc_info=error)
            self.fail(f"supervision broke off: {type(error).__name__}: {error}")

    def fail(self, reason: str) -> None:
        """The engine cannot start, and why, in words: `state` says so, `failed` is set, and
        whatever is in flight ends with an error."""
        self._failure = reason
        for entry in list(self._journal.values()):
            self._end_with_error(entry, f"the engine cannot start: {reason}")
        self.failed.set()

    async def drain(self, grace_s: float) -> None:
        """Take nothing new and wait until what runs is done, at most `grace_s`; what is
        left then ends as cancelled, with the tokens it has."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._nothing_in_flight.wait(), grace_s)
        for entry in list(self._journal.values()):
            self._drop(entry)
            entry.receive(SequenceOutput(entry.id, [], finish_reason="cancelled"))

    async def stop(self) -> None:
        """End the engine process."""
        self._draining = True
        is_loaded = self._ready
        self._send(Shutdown())
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        # One that is still loading does not read messages; there is nothing to lose in it.
        await self._end_engine(grace_s=2.0 if is_loaded else 0.0)

    def _admit(self, requests: list[SequenceRequest], timeout_s: float) -> None:
        state = self.state
        info = self._info
        if state in ("starting", "draining", "failed") or info is None:
            raise EngineUnavailableError(self.state_reason, retry_after_s=2.0)
        for request in requests:
            _check_fits(request, info)
        if len(requests) > self.max_in_flight:
            raise NeverFitsError(
                f"{len(requests)} continuations were asked for; this server runs or queues "
                f"{self.max_in_flight} at most",
                field="n",
            )
        wait_s = self._replacement_wait_s()
        if wait_s > timeout_s:
            raise EngineUnavailableError(self.state_reason, retry_after_s=max(1.0, wait_s))
        if self.in_flight + len(requests) > self.max_in_flight:
            excess = self.in_flight + len(requests) - self.max_in_flight
            raise QueueFullError(
                f"{self.in_flight} requests are in flight; the limit is {self.max_in_flight}",
                retry_after_s=self._backlog.time_for_requests(excess),
            )
        self._admit_tokens(sum(_num_tokens(request) for request in requests))

    def _admit_tokens(self, num_tokens: int) -> None:
        """Bound the work that waits; a queue that is empty takes whatever fits the model."""
        waiting, limit = self._backlog.num_waiting_tokens, self.max_queue_tokens
        excess = 0 if limit is None else waiting + num_tokens - limit
        if waiting and excess > 0:
            raise QueueFullError(
                f"{waiting} tokens wait for their first step and this request has {num_tokens} "
                f"with its max_tokens; the limit is {limit}",
                retry_after_s=self._backlog.time_for_tokens(min(waiting, excess)),
            )

    def _replacement_wait_s(self) -> float:
        """How long until there is an engine, if the next one takes as long as the last did."""
        if self._ready and self.state != "stalled":
            return 0.0
        if self._ready:  # stalled: it is given up first
            return max(0.0, self.stall_s - self.heartbeat_age_s) + self._start_s
        return max(0.0, self._start_s - (time.monotonic() - self._began_at))

    def _drop(self, entry: JournalEntry) -> None:
        if self._forget(entry):
            if entry.is_sent:
                self._send(Abort(entry.id))
            if entry.deaths >= SUSPECT_DEATHS:
                self._send_due()

    def _forget(self, entry: JournalEntry) -> bool:
        """Take an ended sequence out of the journal; False when it was not in it."""
        was_there = self._journal.pop(entry.id, None) is not None
        if was_there:
            self._backlog.ended(entry.id)
        if not self._journal:
            self._nothing_in_flight.set()
        return was_there

    def _send(self, message: ToEngine) -> None:
        """Queue a message; without an engine there is nobody to tell, and the journal is
        what the next one starts from."""
        if self._ready and self._socket is not None:
            self._socket.send(encoder.encode(message))

    def _send_due(self) -> None:
        """Give the engine what it does not have yet: everything, or the first suspect."""
        if not self._ready:
            return  # Ready sends what is due then
        due = [entry for entry in self._journal.values() if not entry.is_sent]
        if any(entry.deaths >= SUSPECT_DEATHS for entry in self._journal.values()):
            is_testing = any(
                entry.is_sent and entry.deaths >= SUSPECT_DEATHS for entry in self._journal.values()
            )
            suspects = [entry for entry in due if entry.deaths >= SUSPECT_DEATHS]
            due = [] if is_testing else suspects[:1]
        for entry in due:
            entry.is_sent = True
            self._send(entry.to_submit())

    async def _supervise(self, config: EngineConfig) -> None:
        """Run one engine after another until stopped or the engine cannot start."""
        backoff_s = 0.0
        while True:
            if self._engine is None:
                self.spawn()
            try:
                reason = await self._run_engine(config)
            finally:
                self._ready = False
            await self._end_engine(grace_s=0.0)
            if self._failure:
                return
            self.restarts += 1
            self._count_deaths()
            log.error("%s; replacing it (%d in flight)", reason, self.in_flight)
            is_short = time.monotonic() - self._began_at < SHORT_LIFE_S
            self._began_at = time.monotonic()
            backoff_s = min(MAX_BACKOFF_S, max(0.5, 2 * backoff_s)) if is_short else 0.0
            await asyncio.sleep(backoff_s)

    async def _run_engine(self, config: EngineConfig) -> str:
        """Configure the engine and read it until it dies or stalls; says which."""
        engine = self._engine
        if engine is None:
            raise RuntimeError("no engine process was spawned")
        self._socket = engine.bind()
        self._socket.send(encoder.encode(config))
        self._heard_at = time.monotonic()
        while True:
            if await self._socket.poll(200):
                try:
                    self._handle(await self._socket.recv())
                except msgspec.MsgspecError as error:
                    return f"the engine sent a message that breaks the schema: {error}"
                if self._failure:
                    return self._failure
                continue
            status = engine.process.poll()
            if status is not None:
                return f"the engine process ended with status {status}"
            if self._ready and self.heartbeat_age_s > self.stall_s:
                return f"the engine was not heard for {self.heartbeat_age_s:.1f} s"

    def _handle(self, data: bytes) -> None:
        message = from_engine_decoder.decode(data)
        self._heard_at = time.monotonic()
        if isinstance(message, StepOutput):
            self._stats = message.stats
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, Ready):
            self._info = message.info
            self._ready = True
            self._start_s = self._heard_at - self._began_at
            self._send_due()
        elif isinstance(message, StartFailed):
            self.fail(message.reason)

    def _deliver(self, output: SequenceOutput) -> None:
        entry = self._journal.get(output.id)
        if entry is None:
            return  # cancelled while this was on its way
        was_suspect = entry.deaths >= SUSPECT_DEATHS
        entry.deaths = 0
        entry.receive(output)
        if output.token_ids:
            self._backlog.started(entry.id)
        if output.finish_reason is not None:
            self._forget(entry)
        if was_suspect:
            self._send_due()

    def _count_deaths(self) -> None:
        """An engine died: whatever it had been given may be the reason. One that died while
        it was loading had nothing."""
        for entry in list(self._journal.values()):
            if not entry.is_sent:
                continue
            entry.is_sent = False
            entry.deaths += 1
            if entry.deaths >= MAX_DEATHS:
                self._end_with_error(
                    entry, f"the engine died {entry.deaths} times while this request was in it"
                )

    def _end_with_error(self, entry: JournalEntry, reason: str) -> None:
        self._forget(entry)
        entry.receive(SequenceOutput(entry.id, [], finish_reason="error", error=reason))

    async def _end_engine(self, grace_s: float) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.end, grace_s)
            self._engine = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _num_tokens(request: SequenceRequest) -> int:
    """What a sequence may take at most."""
    return len(request.prompt_token_ids) + request.sampling.max_tokens


def _check_fits(request: SequenceRequest, info: ModelInfo) -> None:
    """Refuse what could never run, with the numbers (law 3)."""
    num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    if num_prompt + max_tokens > info.context_length:
        raise NeverFitsError(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; together "
            f"{num_prompt + max_tokens}, and the context length is {info.context_length}",
            field="max_tokens",
        )
    capacity = info.num_blocks * info.block_size
    if num_prompt + max_tokens > capacity:
        raise NeverFitsError(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; together "
            f"{num_prompt + max_tokens}, and the KV cache holds {capacity}",
            field="max_tokens",
        )
