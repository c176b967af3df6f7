"""Tensor parallelism: the engine process and the processes that have the other parts of its model.

    vitrine serve --tensor-parallel-size 2

    API process -- engine process, rank 0: scheduler, books, part 0
                     +- pipe -- rank 1 (service/engine/rank.py): part 1, and no idea of a sequence

Decisions are made once, by rank 0. Of each step it sends the plan and the buffer's numbers, those
that go to its own device too. Every rank launches the same forward and draws the same tokens, so
that the next step can refer to them before anybody has read them. Sums and logits go from device to
device (model/parallel.py): NCCL on GPUs, Gloo on a CPU, over the loopback interface.

A step counts when each rank has launched it. One that fails on some of them, out of memory for one,
is given up by all, and rank 0 does with it as an engine of one device does.

A rank's death is the engine's: rank 0 dies of what its rank died of, and the supervisor starts them
all anew. Rank 0's death closes the pipes, and that ends the ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from model.exchange import ApartError
from model.parallel import Group
from service.engine.device.steps import StepPlan
from service.engine.messages import EngineConfig
from service.engine.rank_messages import (
    Answer,
    ClearBlocks,
    FreeMemory,
    LaunchStep,
    Lead,
    RandomWeights,
    ToRank,
    write,
)

log = logging.getLogger("vitrine.engine")

RANK_MODULE = "service.engine.rank"
POLL_S = 0.1
END_S = 2.0  # for ranks to end by themselves when nobody needs them any more
MEET_LIMIT = timedelta(seconds=120)
LOOPBACK = "lo"


class RankFailedError(Exception):
    """A rank could not load its part; the message is for the operator."""


class StepFailedError(Exception):
    """A step failed on another rank, and so on all of them."""


class Ranks:
    """Rank 0's end. Loads nothing itself: `start`, load the own part, `meet`."""

    def __init__(self, config: EngineConfig, random: RandomWeights | None = None) -> None:
        self.group = Group(0, config.tensor_parallel_size)
        self._folder = Path(tempfile.mkdtemp(prefix="vitrine-ranks-"))
        self._is_closing = False
        self._processes: list[subprocess.Popen[bytes]] = []
        atexit.register(self.close)
        for rank in range(1, self.group.size):
            process = subprocess.Popen(  # noqa: S603 - our own module, no shell
                [sys.executable, "-m", RANK_MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for who started the engine
            )
            self._processes.append(process)
            _send(process, Lead(config, rank, str(self._folder), random))

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the ranks from 1 on."""
        return tuple(process.pid for process in self._processes)

    def meet(self, device: torch.device, heartbeat: Callable[[], None] | None = None) -> None:
        """Wait until every rank has its part, and make the group; from now on a rank's death is
        this process's. Raises `RankFailedError`."""
        answers: list[bytes | None] = [None] * len(self._processes)

        def read(place: int, process: subprocess.Popen[bytes]) -> None:
            answers[place] = process.stdout.readline() if process.stdout is not None else b""

        for place, process in enumerate(self._processes):
            threading.Thread(target=read, args=(place, process), daemon=True).start()
        while any(answer is None for answer in answers):
            time.sleep(POLL_S)
            if heartbeat is not None:
                heartbeat()
        for rank, answer in enumerate(answers, start=1):
            if not answer:
                status = self._processes[rank - 1].wait()
                raise RankFailedError(f"rank {rank} ended with status {status} while loading")
            if failure := msgspec.json.decode(answer, type=Answer).failure:
                raise RankFailedError(f"rank {rank}: {failure}")
        for rank, process in enumerate(self._processes, start=1):
            threading.Thread(target=self._die_with, args=(rank, process), daemon=True).start()
        join(self.group, self._folder, device)
        shutil.rmtree(self._folder, ignore_errors=True)

    def launch(self, plan: StepPlan, numbers: NDArray[np.int32]) -> None:
        """The others do this step too. Their parts must have been sized alike."""
        self._tell(
            LaunchStep(astuple(plan.layout), plan.starts, plan.is_adjusted, numbers.tobytes())
        )

    def agree(self, failure: Exception | None) -> None:
        """Wait until every rank has launched the step, or has failed with it and let the others
        have what they wait for (model/exchange.py). Raises `failure`, or another rank's."""
        answers = [self._answer(rank) for rank in range(1, self.group.size)]
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # see who calls
        for rank, answer in enumerate(answers, start=1):
            if answer.is_out_of_memory:
                raise torch.OutOfMemoryError(f"rank {rank}: {answer.failure}")
            if answer.failure:
                raise StepFailedError(f"rank {rank}: {answer.failure}")

    def await_end(self) -> None:
        """When sums break off, or a pipe does, a rank is probably gone, and `_die_with` is about
        to notice: it must come before this process's own words about it."""
        time.sleep(END_S)

    def free_memory(self) -> None:
        """The others give back what torch keeps, too."""
        self._tell(FreeMemory())

    def clear(self, blocks: list[int]) -> None:
        """The others zero these blocks too."""
        self._tell(ClearBlocks(blocks))

    def close(self) -> None:
        """End the ranks; nobody needs them any more."""
        if self._is_closing:
            return
        self._is_closing = True
        for process in self._processes:
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        deadline = time.monotonic() + END_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tell(self, message: ToRank) -> None:
        for process in self._processes:
            _send(process, message)

    def _answer(self, rank: int) -> Answer:
        process = self._processes[rank - 1]
        line = process.stdout.readline() if process.stdout is not None else b""
        if not line:
            self.await_end()
            raise ApartError(f"rank {rank} has ended")
        return msgspec.json.decode(line, type=Answer)

    def _die_with(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """In a thread of its own: this process may be waiting for the dead one's part of a sum."""
        status = process.wait()
        if self._is_closing:
            return
        log.error(
            "rank %d of the engine ended with status %d, and the engine with it", rank, status
        )
        if status < 0:  # for the supervisor it makes a difference who killed it, and how
            with contextlib.suppress(ValueError, OSError):
                signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
            time.sleep(END_S)
        os._exit(status or 1)


def _send(process: subprocess.Popen[bytes], message: ToRank) -> None:
    """A rank that is gone takes this process along in a moment: nothing to say here."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            write(process.stdin, message)


def join(group: Group, folder: Path, device: torch.device) -> None:
    """Make the group of processes that meet in `folder`. They are on one machine."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=group.rank,
        world_size=group.size,
        timeout=MEET_LIMIT,
        device_id=device if device.type == "cuda" else None,
    )
    # Who comes first must not take the folder away that the others still look into: after a sum of
    # all, all are through.
    group.least(0, device)
