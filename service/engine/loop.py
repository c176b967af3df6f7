"""The engine process: receive, step, send.

    python -m service.engine SOCKET FOLDER

SOCKET is the number of an inherited descriptor, the engine's end of a pair; FOLDER holds the
flight recorder. It imports torch, takes one `EngineConfig` (which for a standby comes much later),
answers `Ready` or `StartFailed`, and then steps while there is work. What ends it unasked is told
as `Fatal`. Standard input is a pipe whose other end the API process holds: when it closes, the API
is gone, however it died, and so is the engine.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from service import logs
from service.engine.burst import Burst
from service.engine.channel import Channel, ChannelClosedError
from service.engine.explain_messages import EndExplain, Explain
from service.engine.guests import Guests
from service.engine.heartbeat import HEARTBEAT_S, Heartbeat
from service.engine.messages import (
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
from service.engine.this_cpu import this_cpu
from service.garbage import keep_what_is_there

if TYPE_CHECKING:
    from service.engine.core import EngineCore


def main() -> int:
    """Serve one API process until it says so or goes away."""
    logs.configure_from_environment()
    # Ctrl-C reaches every process of the terminal; the API decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watcher = threading.Thread(target=_exit_with_parent, daemon=True)
    watcher.start()
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    try:
        serve(channel)
    except ChannelClosedError:
        watcher.join(1.0)  # if the API is gone, that thread ends this process in order
        return 1
    except BaseException as error:
        send(channel, Fatal(type(error).__name__, str(error)))
        raise
    finally:
        channel.close(linger_s=1.0)
    return 0


def serve(channel: Channel) -> None:
    """Start as told, then step until shut down."""
    missing = import_libraries()
    keep_what_is_there()  # nearly all there will be; a standby has the time for it
    config = receive(channel)
    if not isinstance(config, EngineConfig):
        raise TypeError(f"the first message must be EngineConfig, got {type(config).__name__}")
    if missing:
        send(channel, StartFailed(missing))
        return
    heartbeat = Heartbeat(lambda progress: send(channel, progress))
    started = start(channel, config, heartbeat)
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
    guests = Guests(core.explain, partial(send, channel), core.recorder)
    outbox = Outbox(config.max_events_s)
    burst = Burst()
    while handle_messages(channel, core, outbox, guests, burst):
        heartbeat.step_begins()
        stepped = core.has_work
        if stepped:
            outbox.add(core.step(), core.step_record())
        elif idle is not None and not guests.has_work and (measured := idle.look()) is not None:
            send(channel, measured)
        if not core.has_work:
            core.scheduler.pool.check()
        due = outbox.due(len(core.scheduler.running))
        if due or not core.has_work:
            send(channel, outbox.take(due, core.stats(), this_cpu()))
        if stepped:
            guests.after_step(is_last=not core.has_work)
        elif guests.has_work:
            guests.alone(is_wanted=lambda: channel.poll(0))


def import_libraries() -> str:
    """torch and what needs it, most of the time that a start takes; what is wrong with them,
    to be reported and not lost."""
    try:
        import service.engine.start  # noqa: F401
    except ImportError as error:
        return f"the engine's libraries cannot be imported: {error}"
    return ""


def start(
    channel: Channel, config: EngineConfig, heartbeat: Heartbeat
) -> tuple[EngineCore, ModelInfo] | None:
    """Load the model and report; None when that failed (and was said)."""
    from model.checkpoint import CheckpointError
    from model.config import ConfigError
    from service.engine.start import StartError, start_engine

    try:
        core, info = start_engine(config, progress=sys.stderr.isatty(), heartbeat=heartbeat)
    except (StartError, CheckpointError, ConfigError, ValueError, MemoryError) as error:
        send(channel, StartFailed(str(error) or type(error).__name__))
        return None
    except RuntimeError as error:  # torch's way to say that memory does not suffice, and more
        first_line = str(error).partition("\n")[0]
        send(channel, StartFailed(f"loading failed: {type(error).__name__}: {first_line}"))
        return None
    send(channel, Ready(info))
    return core, info


def handle_messages(
    channel: Channel, core: EngineCore, outbox: Outbox, guests: Guests, burst: Burst
) -> bool:
    """Take in what has arrived; waits a heartbeat's length when there is nothing to do.
    False when the engine is to end."""
    wait_ms = 0 if core.has_work or guests.has_work else int(HEARTBEAT_S * 1000)
    while channel.poll(wait_ms):
        message = receive(channel)
        wait_ms = 0
        if isinstance(message, Submit):
            core.add(message)
            burst.arrived()
            wait_ms = burst.wait_ms(len(core.scheduler.running))
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
    return True


def receive(channel: Channel) -> ToEngine:
    """The next message; raises `msgspec.ValidationError` for one that breaks the schema."""
    message: ToEngine = to_engine_decoder.decode(channel.receive())
    return message


def send(channel: Channel, message: FromEngine) -> None:
    """Queue a message to the API process. Raises `MessageTooLargeError`."""
    channel.send(encode(message))


def _exit_with_parent() -> None:
    """Ends this process at once when the parent closes our standard input; the folder, which
    the parent can no longer remove, goes with it."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(_folder(), ignore_errors=True)
    os._exit(1)


def _folder() -> Path:
    """What the API process made for this life."""
    return Path(sys.argv[2])
