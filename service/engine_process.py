"""Starting and ending the engine process, and the socket to it that nobody else can open."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from model.threads import set_wait_policy
from service.engine import recorder
from service.engine_link import EngineLink, LinkListener

log = logging.getLogger("vitrine.engine")

# The module that the engine process runs. Fault tests put one around it.
ENGINE_MODULE = "service.engine"
# A process that waits for a device or a disk does not die of SIGKILL before that answers.
KILL_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """One life of the engine: its process, the folder of its flight recorder, and the API's end
    of the socket between them."""

    process: subprocess.Popen[bytes]
    folder: Path  # mode 0700
    api_end: socket.socket

    @classmethod
    def spawn(cls) -> EngineProcess:
        """Start the process; it loads its libraries and waits for its configuration. Returns
        at once."""
        folder = Path(tempfile.mkdtemp(prefix="vitrine-"))
        environment = dict(os.environ)
        environment.pop("VITRINE_API_KEYS", None)  # no business of the engine's
        set_wait_policy(environment)
        try:
            recorder.create(folder)
            ours, its = socket.socketpair()
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            process = subprocess.Popen(  # noqa: S603 - our own module, no shell
                [sys.executable, "-m", ENGINE_MODULE, str(its.fileno()), str(folder)],
                pass_fds=[its.fileno()],
                stdin=subprocess.PIPE,  # never written to; its closing tells the engine we are gone
                env=environment,
                start_new_session=True,  # Ctrl-C is for the API, which ends the engine in order
            )
        except OSError:
            ours.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            its.close()
        return cls(process, folder, ours)

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

    async def link(self, listener: LinkListener) -> EngineLink:
        """Begin to read what it says. Raises `OSError` where its folder was swept away with other
        old files: it could not begin."""
        (self.folder / recorder.FILE_NAME).stat()
        # A copy, that the transport closes; `end` closes this one.
        return await EngineLink.open(self.api_end.dup(), listener)

    def wait(self, limit_s: float) -> None:
        """Until it has ended, or so long. Blocks: call it off the event loop."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(limit_s)

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
        self.api_end.close()
        shutil.rmtree(self.folder, ignore_errors=True)
