"""The engine process: receive, step, send.

    python -m service.engine ENDPOINT

It connects to the API's socket, imports torch, takes one `EngineConfig` (which for a standby
comes much later), answers `Ready` or `StartFailed`, and then steps while there is work. What
ends it unasked is told as `Fatal`. Standard input is a pipe whose other end the API process
holds: when it closes, the API is gone, however it died, and so is the engine.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from service import logs
from service.engine.explain_messages import EndExplain, Explain
from service.engine.guests import Guests
from service.engine.heartbeat import HEARTBEAT_S, Heartbeat
from service.engine.messages import (
    MAX_MESSAGE_BYTES,
    Abort,
    EngineConfig,
    Fatal,
    FromEngine,
    ModelInfo,
    Ready,
    Shutdown,
    StartFailed,
    Submit,
    ToEngine,
    encode,
    to_engine_decoder,
)
from service.engine.outbox import Outbox
from service.engine.recorder import Recorder
from service.garbage import keep_what_is_there

if TYPE_CHECKING:
    from service.engine.core import EngineCore


def main() -> int:
    """Serve one API process until it says so or goes away."""
    logs.configure_from_environment()
    # Ctrl-C reaches every process of the terminal; the API decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    context = zmq.Context()
    socket = connect(context, sys.argv[1])
    try:
        serve(socket)
    except BaseException as error:
        send(socket, Fatal(type(error).__name__, str(error)))
        raise
    finally:
        socket.close(linger=1000)
        context.term()
    return 0


def connect(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    """A paired socket to the API process, bounded in message length."""
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    # The API reads in its own time; a step must never block on it. What it has not read is
    # bounded by what is in flight: one small message a step.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(endpoint)
    return socket


def serve(socket: zmq.Socket[bytes]) -> None:
    """Start as told, then step until shut down."""
    missing = import_libraries()
    keep_what_is_there()  # nearly all there will be; a standby has the time for it
    config = receive(socket)
    if not isinstance(config, EngineConfig):
        raise TypeError(f"the first message must be EngineConfig, got {type(config).__name__}")
    if missing:
        send(socket, StartFailed(missing))
        return
    heartbeat = Heartbeat(lambda progress: send(socket, progress))
    started = start(socket, config, heartbeat)
    if started is None:
        return
    core, info = started
    from service.engine.idle import IdleRoofline

    idle = None
    # Of a CPU whose cores are shared by several ranks, nobody could say what it would mean.
    if config.measure_roofline and (info.tensor_parallel_size == 1 or info.device != "cpu"):
        device = core.runner.cache.keys.device
        idle = IdleRoofline(device, info.dtype, num_devices=info.tensor_parallel_size)
    core.recorder = Recorder(_folder())
    guests = Guests(core.explain, partial(send, socket), core.recorder)
    outbox = Outbox(config.max_events_s)
    while handle_messages(socket, core, outbox, guests):
        heartbeat.step_begins()
        stepped = core.has_work
        if stepped:
            outbox.add(core.step(), core.step_record())
        elif idle is not None and not guests.has_work and (measured := idle.look()) is not None:
            send(socket, measured)
        if not core.has_work:
            core.scheduler.pool.check()
        due = outbox.due(len(core.scheduler.running))
        if due or not core.has_work:
            send(socket, outbox.take(due, core.stats()))
        if stepped:
            guests.after_step(is_last=not core.has_work)
        elif guests.has_work:
            guests.alone(is_wanted=lambda: bool(socket.poll(0)))


def import_libraries() -> str:
    """torch and what needs it, most of the time that a start takes; what is wrong with them,
    to be reported and not lost."""
    try:
        import service.engine.start  # noqa: F401
    except ImportError as error:
        return f"the engine's libraries cannot be imported: {error}"
    return ""


def start(
    socket: zmq.Socket[bytes], config: EngineConfig, heartbeat: Heartbeat
) -> tuple[EngineCore, ModelInfo] | None:
    """Load the model and report; None when that failed (and was said)."""
    from model.checkpoint import CheckpointError
    from model.config import ConfigError
    from service.engine.start import StartError, start_engine

    try:
        core, info = start_engine(config, progress=sys.stderr.isatty(), heartbeat=heartbeat)
    except (StartError, CheckpointError, ConfigError, ValueError, MemoryError) as error:
        send(socket, StartFailed(str(error) or type(error).__name__))
        return None
    except RuntimeError as error:  # torch's way to say that memory does not suffice, and more
        first_line = str(error).partition("\n")[0]
        send(socket, StartFailed(f"loading failed: {type(error).__name__}: {first_line}"))
        return None
    send(socket, Ready(info))
    return core, info


def handle_messages(
    socket: zmq.Socket[bytes], core: EngineCore, outbox: Outbox, guests: Guests
) -> bool:
    """Take in what has arrived; waits a heartbeat's length when there is nothing to do.
    False when the engine is to end."""
    wait_ms = 0 if core.has_work or guests.has_work else int(HEARTBEAT_S * 1000)
    while socket.poll(wait_ms):
        message = receive(socket)
        if isinstance(message, Submit):
            core.add(message)
        elif isinstance(message, Abort):
            core.abort(message.id)
            outbox.forget(message.id)
        elif isinstance(message, Explain):
            guests.add(message)
        elif isinstance(message, EndExplain):
            guests.forget(message.id)
        elif isinstance(message, Shutdown):
            return False
        else:
            raise TypeError(f"unexpected {type(message).__name__} on a running engine")
        wait_ms = 0
    return True


def receive(socket: zmq.Socket[bytes]) -> ToEngine:
    """The next message; raises `msgspec.ValidationError` for one that breaks the schema."""
    message: ToEngine = to_engine_decoder.decode(socket.recv())
    return message


def send(socket: zmq.Socket[bytes], message: FromEngine) -> None:
    """Queue a message to the API process. Raises `MessageTooLargeError`."""
    socket.send(encode(message))


def _exit_with_parent() -> None:
    """Ends this process at once when the parent closes our standard input; the socket's
    folder, which the parent can no longer remove, goes with it."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(_folder(), ignore_errors=True)
    os._exit(1)


def _folder() -> Path:
    """What the API process made for this life: the socket is in it, and the recorder."""
    return Path(sys.argv[1].removeprefix("ipc://")).parent
