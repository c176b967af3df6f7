"""The API's side of the chat template: one worker process, its time limit, and its end.

The worker takes one conversation after another. A rendering takes well under a millisecond, so
that one process serves many clients; one that takes too long is killed with its process, and
the next rendering starts another. What a template from a stranger can take is so one core for
`time_limit_s` per request, one request at a time, and the worker's bounded memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process

import msgspec

from model.chat_template import ChatTemplate, ChatTemplateError
from service.frames import LENGTH
from service.template_worker import (
    MAX_FRAME_BYTES,
    Answer,
    Question,
    Refused,
    Render,
    Rendered,
    Start,
    Started,
    answer_decoder,
    framed,
)

log = logging.getLogger("vitrine.chat")

START_LIMIT_S = 20.0  # for an interpreter and its libraries, on a busy machine
ALARM_MARGIN_S = 0.5  # the worker's own alarm, for when nobody is here to kill it
# All that the worker gets of the environment: a template that escaped the sandbox finds no keys.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")


class ChatBusyError(Exception):
    """Others' renderings took all the time there was; come again later."""


class ChatRenderer:
    """Runs one checkpoint's chat template. Of one event loop."""

    def __init__(
        self, template: ChatTemplate, *, time_limit_s: float = 2.0, wait_limit_s: float = 10.0
    ) -> None:
        """`time_limit_s` bounds one rendering, `wait_limit_s` the wait for one's turn."""
        self._template = template
        self._time_limit_s = time_limit_s
        self._wait_limit_s = wait_limit_s
        self._worker: Process | None = None
        self._turn = asyncio.Lock()

    @property
    def worker_pid(self) -> int | None:
        """The worker's process id, while there is one."""
        return None if self._worker is None else self._worker.pid

    async def check(self) -> None:
        """Start the worker. Raises `ChatTemplateError` when the template does not compile."""
        async with self._turn:
            await self._started()

    async def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt for `messages`.

        Raises `ChatTemplateError` when the template is broken, refuses them, or goes beyond its
        time or memory, and `ChatBusyError` when its turn does not come.
        """
        try:
            async with asyncio.timeout(self._wait_limit_s):
                await self._turn.acquire()
        except TimeoutError:
            raise ChatBusyError(
                f"no turn at the chat template within {self._wait_limit_s:g} s"
            ) from None
        try:
            worker = await self._started()
            answer = await self._ask(worker, Render(messages), self._time_limit_s)
        finally:
            self._turn.release()
        if not isinstance(answer, Rendered):
            raise ChatTemplateError(getattr(answer, "reason", "it answered out of turn"))
        return answer.text

    async def close(self) -> None:
        """End the worker."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        if worker.returncode is None:
            # Not `worker.kill()`: it would take the status of one that has just ended from asyncio.
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
        if worker.stdin is not None:
            worker.stdin.close()
        await worker.wait()

    async def _started(self) -> Process:
        """The worker, with the template compiled."""
        if self._worker is not None and self._worker.returncode is None:
            return self._worker
        await self.close()
        self._worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "service.template_worker",
            stdin=PIPE,
            stdout=PIPE,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,  # Ctrl-C is for the API process
        )
        start = Start(
            self._template.source,
            self._template.special_tokens,
            self._time_limit_s + ALARM_MARGIN_S,
        )
        answer = await self._ask(self._worker, start, START_LIMIT_S)
        if isinstance(answer, Started):
            if not answer.memory_limited:
                log.warning("this system does not bound the memory of the chat template's process")
            return self._worker
        await self.close()
        raise ChatTemplateError(
            answer.reason if isinstance(answer, Refused) else "it answered out of turn"
        )

    async def _ask(self, worker: Process, question: Question, limit_s: float) -> Answer:
        """One question and its answer; whatever goes wrong, or a caller that is cancelled
        meanwhile, ends the worker: an answer that nobody took must not become the next one's."""
        if worker.stdin is None or worker.stdout is None:
            raise RuntimeError("the worker was started without pipes")
        is_answered = False
        try:
            async with asyncio.timeout(limit_s):
                worker.stdin.write(framed(question))
                await worker.stdin.drain()
                head = await worker.stdout.readexactly(LENGTH.size)
                (length,) = LENGTH.unpack(head)
                if length > MAX_FRAME_BYTES:
                    raise ChatTemplateError("its process broke")
                answer: Answer = answer_decoder.decode(await worker.stdout.readexactly(length))
                is_answered = True
                return answer
        except TimeoutError:
            raise ChatTemplateError(f"it did not finish within {limit_s:g} s") from None
        except (OSError, asyncio.IncompleteReadError):
            raise ChatTemplateError("its process ended: it took too much time or memory") from None
        except msgspec.MsgspecError as error:
            log.error("the chat template's process broke the protocol: %s", error)
            raise ChatTemplateError("its process broke") from None
        finally:
            if not is_answered:
                await self.close()
