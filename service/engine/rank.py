"""A process that has a part of the engine's model: `python -m service.engine.rank`.

Started by rank 0 (ranks.py). Loads its part and then does the steps it is told, until its standard
input ends. It knows no sequence, reads no token, and decides nothing.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from typing import TYPE_CHECKING, TextIO

import msgspec
import numpy as np

from service import logs
from service.engine.rank_messages import (
    Answer,
    ClearBlocks,
    FreeMemory,
    LaunchStep,
    Lead,
    ToRank,
    read,
)
from service.garbage import keep_what_is_there

if TYPE_CHECKING:
    from service.engine.device.steps import DeviceSteps


def main() -> int:
    """Serve one rank 0 until it goes away."""
    logs.configure_from_environment()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    messages: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(messages,), daemon=True).start()
    lead = messages.get()
    if not isinstance(lead, Lead):
        raise TypeError(f"the first message must be Lead, got {type(lead).__name__}")
    _serve(lead, messages, answer)
    return 0


def _receive(messages: queue.SimpleQueue[ToRank]) -> None:
    """In a thread of its own: the other one may wait in a sum for a process that is gone."""
    while (message := read(sys.stdin.buffer)) is not None:
        messages.put(message)
    os._exit(0)


def _serve(lead: Lead, messages: queue.SimpleQueue[ToRank], answer: TextIO) -> None:
    import torch

    from model.checkpoint import CheckpointError
    from model.config import ConfigError
    from service.engine.parallel import load_rank, make_steps
    from service.engine.start import StartError

    try:
        model, device = load_rank(lead)
    except (StartError, CheckpointError, ConfigError, RuntimeError, MemoryError) as error:
        _tell(answer, Answer(_words(error)))
        return
    keep_what_is_there()
    _tell(answer, Answer())
    steps = make_steps(lead, model, device)
    while True:
        message = messages.get()
        if isinstance(message, LaunchStep):
            _tell(answer, _launch(steps, message))
        elif isinstance(message, FreeMemory):
            if device.type == "cuda":
                torch.cuda.empty_cache()
        elif isinstance(message, ClearBlocks):
            steps.forward.backend.cache.clear(message.blocks)
        else:
            raise TypeError(f"unexpected {type(message).__name__} on a running rank")


def _launch(steps: DeviceSteps, message: LaunchStep) -> Answer:
    """Do a step. Raises `ApartError`, and nothing else."""
    from model.exchange import ApartError
    from service.engine.device.layout import Layout
    from service.engine.device.steps import StepPlan
    from service.engine.runner import is_out_of_memory

    plan = StepPlan(
        Layout(*message.layout),
        None,
        message.starts,
        message.is_adjusted,
        len(message.numbers) // 4,
    )
    try:
        with steps.together(plan):
            upload = steps.upload(plan.layout, None)
            upload.begin()[: plan.num_numbers] = np.frombuffer(message.numbers, np.int32)
            upload.send(plan.num_numbers)
            steps.launch(plan)
    except ApartError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, rank 0 knows what to do
        return Answer(_words(error), is_out_of_memory(error))
    return Answer()


def _words(error: Exception) -> str:
    """One line that is not empty."""
    return str(error).partition("\n")[0] or type(error).__name__


def _tell(answer: TextIO, message: Answer) -> None:
    answer.write(msgspec.json.encode(message).decode() + "\n")
    answer.flush()


if __name__ == "__main__":
    sys.exit(main())
