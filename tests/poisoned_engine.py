"""The real engine, at fault with one prompt: `POISON=FAULT python -m tests.poisoned_engine`.

The forward of a step in which a sequence begins with POISONED_PROMPT, or an explanation of a text
that does, raises, runs out of memory, aborts the process, leaves it, hangs, or takes LAYER_S for
each layer; with `unborn` the process dies whenever it is to load the model. Faults that name a rank
are in tests/poisoned_rank.py. While the file that LINGER names exists, every step of every request
takes STEP_S longer.
`tests.poisoned_server` is a server with this engine.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from model.kernels import native
from model.kernels.native import NativeKernelError
from model.sampling import SampledTokens
from model.transformer import Block
from service.engine import loop, start
from service.engine.explain_messages import Explain
from service.engine.guests import Work
from service.engine.profile import StepProfile
from service.engine.runner import Runner
from service.engine.scheduler import Scheduled
from service.engine.sights import Sights

POISONED_PROMPT = [7, 7, 7, 7]
LAYER_S = 0.8
STEP_S = 0.01


def raise_error() -> NoReturn:
    raise RuntimeError("poisoned: see /somewhere/secret.py")


def out_of_memory() -> NoReturn:
    raise MemoryError


def hang() -> NoReturn:
    while True:
        time.sleep(60)


def leave() -> NoReturn:
    os._exit(3)


def no_compiler() -> NoReturn:
    raise NativeKernelError("not in this test")


def linger(while_there: Path) -> None:
    """What is killed in the middle of its streams must not be through with them before."""
    healthy = Runner.run

    def run(self: Runner, *inputs: Any) -> tuple[SampledTokens, Sights]:
        if while_there.exists():
            time.sleep(STEP_S)
        return healthy(self, *inputs)

    Runner.run = run  # type: ignore[method-assign]


def slow() -> None:
    healthy = Block.forward

    def forward(self: Block, *inputs: Any) -> Tensor:
        time.sleep(LAYER_S)
        return healthy(self, *inputs)

    Block.forward = forward  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "raise": raise_error,
    "memory": out_of_memory,
    "abort": os.abort,
    "exit": leave,
    "hang": hang,
    "slow": slow,
}


def poisoned(fault: str) -> None:
    """Put the fault into every runner of this process."""
    if fault == "unborn":
        loop.start = lambda *_: os.abort()
        return
    if fault.startswith("rank"):
        # Here: they need triton, which not every machine has.
        from service.engine import ranks
        from tests.poisoned_rank import poison_rank

        ranks.RANK_MODULE = "tests.poisoned_rank"
        poison_rank(0, fault)
        return
    if fault == "slow":
        native.load = no_compiler  # layers that Python can slow down
    healthy = Runner.run

    def run(
        self: Runner, step: list[Scheduled], profile: StepProfile
    ) -> tuple[SampledTokens, Sights]:
        for item in step:
            if item.sequence.token_ids[: len(POISONED_PROMPT)] == POISONED_PROMPT:
                FAULTS[fault]()
        return healthy(self, step, profile)

    Runner.run = run  # type: ignore[method-assign]
    explain = start.explain

    def poisoned_explain(model: Any, eos: Any, request: Explain, send: Any) -> Work:
        if request.token_ids[: len(POISONED_PROMPT)] == POISONED_PROMPT:
            FAULTS[fault]()
        return (yield from explain(model, eos, request, send))

    start.explain = poisoned_explain


if __name__ == "__main__":
    file = os.environ.get("LINGER")
    if file is not None:
        linger(Path(file))
    if file is None or "POISON" in os.environ:
        poisoned(os.environ["POISON"])
    sys.exit(loop.main())
