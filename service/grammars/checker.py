"""The API's side of the worker process: is this grammar one that the engine can compile?

Every grammar is tried in the worker before it is admitted, one at a time, with a limit on
processor time and one on memory; a worker that goes over is replaced. Verdicts are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from model.grammar_spec import GrammarSpec
from service.engine.messages import ModelInfo
from service.grammars import GrammarError

log = logging.getLogger("vitrine.grammars")


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """Bounds of the checks."""

    cpu_s: float = 2.0  # of processor time, for one grammar
    wall_s: float = 30.0  # the same by the clock, on a machine that has no time for it
    memory_bytes: int = 2**30
    max_waiting: int = 16  # grammars that wait for the worker
    max_verdicts: int = 256


class CheckerBusyError(Exception):
    """Too many new grammars wait already."""


class GrammarChecker:
    """Owns the worker process, which starts with the first grammar."""

    def __init__(
        self, directory: Callable[[], Path | None], limits: CheckLimits | None = None
    ) -> None:
        """`directory` is the model's; None while it is being looked for."""
        self._directory = directory
        self._limits = limits or CheckLimits()
        self._verdicts: OrderedDict[GrammarSpec, str | None] = OrderedDict()
        self._worker: Process | None = None
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    async def check(self, spec: GrammarSpec, info: ModelInfo) -> None:
        """Raises `GrammarError` for a grammar that is wrong or too much, `CheckerBusyError`
        when too many are waiting."""
        if spec in self._verdicts:
            self._verdicts.move_to_end(spec)
            verdict = self._verdicts[spec]
        else:
            verdict = await self._in_turn(spec, info)
        if verdict is not None:
            raise GrammarError(verdict)

    async def close(self) -> None:
        """End the worker."""
        worker, self._worker = self._worker, None
        if worker is not None:
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            await worker.wait()

    async def _in_turn(self, spec: GrammarSpec, info: ModelInfo) -> str | None:
        if self._num_waiting >= self._limits.max_waiting:
            raise CheckerBusyError(
                f"{self._num_waiting} new grammars wait to be checked; the limit is "
                f"{self._limits.max_waiting}"
            )
        self._num_waiting += 1
        try:
            async with self._turn:
                if spec not in self._verdicts:  # another request may have asked meanwhile
                    self._verdicts[spec] = await self._ask(spec, info)
                    if len(self._verdicts) > self._limits.max_verdicts:
                        self._verdicts.popitem(last=False)
                return self._verdicts[spec]
        finally:
            self._num_waiting -= 1

    async def _ask(self, spec: GrammarSpec, info: ModelInfo) -> str | None:
        worker = self._worker
        try:
            if worker is None or worker.returncode is not None:
                worker = self._worker = await self._start(info)
            async with asyncio.timeout(self._limits.wall_s):
                answer = await _exchange(worker, msgspec.json.encode(spec))
        except TimeoutError:
            await self.close()
            return f"it was not compiled within {self._limits.wall_s:g} s"
        except BaseException:
            await self.close()  # or the next one would read the answer to this one
            raise
        if answer:
            return msgspec.json.decode(answer, type=str | None)
        status = await worker.wait()
        log.warning("the grammar worker ended with status %d on a %s", status, spec.kind)
        if status == -signal.SIGPROF:
            return f"it takes more than {self._limits.cpu_s:g} s to compile"
        return (
            f"it is too large or too deep to compile within {self._limits.memory_bytes >> 20} MiB"
        )

    async def _start(self, info: ModelInfo) -> Process:
        directory = self._directory()
        if directory is None:
            raise RuntimeError("there is no model yet to check grammars for")
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "service.grammars.worker",
            stdin=PIPE,  # its closing ends the worker, should this process be gone
            stdout=PIPE,
            env=os.environ | {"RAYON_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the API, which ends the worker
        )
        self._worker = worker
        config = {
            "directory": str(directory),
            "vocab_size": info.vocab_size,
            "eos_token_ids": info.eos_token_ids,
            "cpu_s": self._limits.cpu_s,
            "memory_bytes": self._limits.memory_bytes,
        }
        if not await _exchange(worker, msgspec.json.encode(config)):
            raise RuntimeError(f"the grammar worker ended with status {await worker.wait()}")
        return worker


async def _exchange(worker: Process, line: bytes) -> bytes:
    """Its answer, a line; empty when it ended instead."""
    if worker.stdin is None or worker.stdout is None:
        raise RuntimeError("the grammar worker has no pipes")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        worker.stdin.write(line + b"\n")
        await worker.stdin.drain()
    return await worker.stdout.readline()
