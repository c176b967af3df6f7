"""Starting and ending the engine process, and the private socket to it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.asyncio

from model.threads import set_wait_policy
from service.engine import recorder
from service.engine.messages import MAX_MESSAGE_BYTES

log = logging.getLogger("vitrine.engine")

# The module that the engine process runs. Fault tests put one around it.
ENGINE_MODULE = "service.engine"
# A process that waits for a device or a disk does not die of SIGKILL before that answers.
KILL_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """One life of the engine: its process and the folder that holds its socket."""

    process: subprocess.Popen[bytes]
    folder: Path  # mode 0700: nobody else can open the socket in it

    @classmethod
    def spawn(cls) -> EngineProcess:
        """Start the process; it loads its libraries and waits for its configuration. Returns
        at once."""
        folder = Path(tempfile.mkdtemp(prefix="vitrine-"))
        if len(str(folder / "engine")) >= zmq.IPC_PATH_MAX_LEN:
            # A long TMPDIR: the system bounds the length of a socket's path.
            folder.rmdir()
            folder = Path(tempfile.mkdtemp(prefix="vitrine-", dir="/tmp"))
        recorder.create(folder)
        environment = dict(os.environ)
        environment.pop("VITRINE_API_KEYS", None)  # no business of the engine's
        set_wait_policy(environment)
        process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", ENGINE_MODULE, _endpoint(folder)],
            stdin=subprocess.PIPE,  # never written to; its closing tells the engine we are gone
            env=environment,
            start_new_session=True,  # Ctrl-C is for the API, which ends the engine in order
        )
        return cls(process, folder)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def ending(self) -> str:
        """How it ended, in words that hold no path: the signal or the exit status."""
        status = self.process.poll()
        if status is None:
            return "did not end"
        if status >= 0:
            return f"ended with status {status}"
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"

    @property
    def is_killed_from_outside(self) -> bool:
        """Whether it was ended by a signal that no fault of its own raises."""
        return self.process.poll() in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP)

    @property
    def ids_in_step(self) -> frozenset[int]:
        """The sequences that it was computing when it ended; empty when it was not."""
        return recorder.read(self.folder)

    def bind(self) -> zmq.asyncio.Socket:
        """The API's end of the socket."""
        socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.bind(_endpoint(self.folder))
        return socket

    def end(self, grace_s: float) -> None:
        """Wait `grace_s` for the process to end by itself, then kill it. Blocks: call it off
        the event loop."""
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            try:
                self.process.wait(KILL_LIMIT_S)
            except subprocess.TimeoutExpired:
                log.error("engine process %d does not die; going on", self.process.pid)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _endpoint(folder: Path) -> str:
    return f"ipc://{folder / 'engine'}"
