"""Starting and ending the engine process, and the private socket to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.asyncio

from model.threads import set_wait_policy
from service.engine.messages import MAX_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """One life of the engine: its process and the folder that holds its socket."""

    process: subprocess.Popen[bytes]
    folder: Path  # mode 0700: nobody else can open the socket in it

    @classmethod
    def spawn(cls) -> EngineProcess:
        """Start the process; it waits for its configuration. Returns at once."""
        folder = Path(tempfile.mkdtemp(prefix="vitrine-"))
        if len(str(folder / "engine")) >= zmq.IPC_PATH_MAX_LEN:
            # A long TMPDIR: the system bounds the length of a socket's path.
            folder.rmdir()
            folder = Path(tempfile.mkdtemp(prefix="vitrine-", dir="/tmp"))
        environment = dict(os.environ)
        environment.pop("VITRINE_API_KEYS", None)  # no business of the engine's
        set_wait_policy(environment)
        process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", "service.engine", _endpoint(folder)],
            stdin=subprocess.PIPE,  # never written to; its closing tells the engine we are gone
            env=environment,
            start_new_session=True,  # Ctrl-C is for the API, which ends the engine in order
        )
        return cls(process, folder)

    def bind(self) -> zmq.asyncio.Socket:
        """The API's end of the socket."""
        socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.bind(_endpoint(self.folder))
        return socket

    def end(self, grace_s: float) -> int:
        """Wait `grace_s` for the process to end by itself, then kill it; its exit status.
        Blocks: call it off the event loop."""
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.process.returncode


def _endpoint(folder: Path) -> str:
    return f"ipc://{folder / 'engine'}"
