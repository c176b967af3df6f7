"""Where the time of a decode step goes, and what torch counts while a step runs; JSON on stdout.

    python -m loadtests.report.where time --shape gpt2 --dtype bfloat16 --batch 1,32
    python -m loadtests.report.where count --shape gpt2

The compiled forward is one call: a part of it is timed by leaving it out (its product gets no
outputs) and subtracting the fastest steps seen. A forward in PyTorch is timed module by module, the
device waited for before and after each, which makes it a little slower than it is.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from model.threads import set_wait_policy

set_wait_policy(os.environ)  # before torch is imported

import msgspec
import torch

from loadtests.report.counting import count_step
from loadtests.report.records import Where
from model.compiled import CompiledForward
from model.families import read_config
from model.families.published import PUBLISHED
from model.forward import EagerForward, Forward
from model.sampling_params import SamplingParams
from service.bench.random_weights import start_random_engine
from service.engine.core import EngineCore
from service.engine.messages import EngineConfig, Submit
from service.engine.roofline import synchronize

ROUNDS = 7
STEPS = 2
MODULES = {
    "embedding": "embedding",
    "attention.qkv": "Q, K, V products",
    "attention.out": "output product",
    "mlp": "MLP",
    "lm_head": "head",
}
REST = "norms, residuals, threads"


def steps_of(core: EngineCore, count: int) -> list[tuple[float, float, float]]:
    """(forward, sampling, host) seconds of so many steps."""
    times = []
    for _ in range(count):
        core.step()
        step = core.last_step
        times.append((step.forward_s, step.sample_s, step.host_s))
    return times


@contextmanager
def without(forward: CompiledForward, part: str) -> Iterator[None]:
    """The same forward with nothing to do in one part; its results mean nothing."""
    layers, model = forward._layers, forward._struct
    if part == "head":
        linears = [model.lm_head]
    elif part == "MLP":
        linears = [linear for layer in layers for linear in (layer.up, layer.down)]
    else:
        name = {"Q, K, V products": "qkv", "output product": "out"}[part]
        linears = [getattr(layer, name) for layer in layers]
    held = [linear.out_features for linear in linears]
    for linear in linears:
        linear.out_features = 0
    try:
        yield
    finally:
        for linear, size in zip(linears, held, strict=True):
            linear.out_features = size


class NoAttention:
    """A compiled forward's library whose step has no queries: keys and values are written, and
    nothing attends."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._forward = library.vitrine_forward

    def vitrine_forward(self, model: object, step: object) -> None:
        """The call, with no jobs in it."""
        step._obj.num_jobs = 0  # type: ignore[attr-defined]  # a ctypes reference's object
        self._forward(model, step)


@contextmanager
def without_attention(forward: CompiledForward) -> Iterator[None]:
    library = forward._library
    forward._library = NoAttention(library)  # type: ignore[assignment]
    try:
        yield
    finally:
        forward._library = library


def by_leaving_out(core: EngineCore, forward: CompiledForward) -> dict[str, float]:
    """Seconds of each part; rounds alternate, so that the machine's moods meet all alike."""
    parts: dict[str, list[float]] = {}
    whole: list[tuple[float, float, float]] = []
    leave: dict[str, Callable[[], object]] = {
        part: (lambda part=part: without(forward, part))  # type: ignore[misc]
        for part in ("Q, K, V products", "output product", "MLP", "head")
    }
    leave["attention"] = lambda: without_attention(forward)
    for _ in range(ROUNDS):
        whole += steps_of(core, STEPS)
        for part, context in leave.items():
            with context():  # type: ignore[attr-defined]
                parts.setdefault(part, []).extend(one for one, _, _ in steps_of(core, STEPS))
    forward_s, sample_s, host_s = (min(column) for column in zip(*whole, strict=True))
    seconds = {part: max(0.0, forward_s - min(times)) for part, times in parts.items()}
    seconds["embedding"] = _embedding_s(core, forward)
    seconds[REST] = max(0.0, forward_s - sum(seconds.values()))
    return seconds | {"sampling": sample_s, "host": host_s}


def _embedding_s(core: EngineCore, forward: CompiledForward) -> float:
    ids = torch.zeros(len(core.sequences), dtype=torch.int64)
    times = []
    with torch.inference_mode():
        for _ in range(ROUNDS * STEPS):
            began = time.perf_counter()
            forward._model.embed(ids, ids)
            times.append(time.perf_counter() - began)
    return min(times)


class Stopwatch:
    """Sums up what modules of a PyTorch forward take."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = 0.0
        self.seconds: dict[str, float] = {}

    def start(self, *_: object) -> None:
        synchronize(self._device)
        self._began = time.perf_counter()

    def stop(self, part: str) -> Callable[..., None]:
        """A hook that books the time since the start."""

        def book(*_: object) -> None:
            synchronize(self._device)
            spent = time.perf_counter() - self._began
            self.seconds[part] = self.seconds.get(part, 0.0) + spent

        return book


class TimedBackend:
    """An attention backend whose steps are timed."""

    def __init__(self, backend: object, watch: Stopwatch) -> None:
        self._backend, self._watch = backend, watch

    def begin(self, batch: object) -> Callable[..., torch.Tensor]:
        attend = self._backend.begin(batch)  # type: ignore[attr-defined]

        def timed(*arguments: object) -> torch.Tensor:
            self._watch.start()
            gathered: torch.Tensor = attend(*arguments)
            self._watch.stop("attention")()
            return gathered

        return timed


def by_modules(core: EngineCore, forward: EagerForward, device: torch.device) -> dict[str, float]:
    """Seconds of each part of an average step."""
    watch = Stopwatch(device)
    for name, module in forward.model.named_modules():
        for suffix, part in MODULES.items():
            if name == suffix or (name.startswith("blocks.") and name.endswith("." + suffix)):
                module.register_forward_pre_hook(watch.start)
                module.register_forward_hook(watch.stop(part))
    timed = EagerForward(forward.model, TimedBackend(forward.backend, watch))  # type: ignore[arg-type]
    core.runner = replace(core.runner, forward=timed)
    steps_of(core, STEPS)
    watch.seconds.clear()
    times = steps_of(core, ROUNDS)
    forward_s, sample_s, host_s = (sum(column) / ROUNDS for column in zip(*times, strict=True))
    seconds = {part: spent / ROUNDS for part, spent in watch.seconds.items()}
    seconds[REST] = max(0.0, forward_s - sum(seconds.values()))
    return seconds | {"sampling": sample_s, "host": host_s}


def time_parts(given: argparse.Namespace, raw: dict[str, object]) -> list[Where]:
    """For each batch size."""
    found = []
    for batch in (int(word) for word in given.batch.split(",")):
        needed = given.context + (ROUNDS + 1) * STEPS * 8
        config = EngineConfig(
            "", device=given.device, dtype=given.dtype, max_num_seqs=batch, threads=given.threads
        )
        shape = read_config(raw)
        core, info = start_random_engine(shape, config, needed_len=needed, seed=0)
        rng = random.Random(batch)
        for id_ in range(batch):
            prompt = [rng.randrange(shape.vocab_size) for _ in range(given.context)]
            params = SamplingParams(max_tokens=needed, temperature=0.0, ignore_eos=True)
            core.add(Submit(id_, prompt, replace(params, max_tokens=needed - given.context)))
        while any(one.num_output < 2 for one in core.sequences.values()):
            core.step()
        forward: Forward = core.runner.forward
        if isinstance(forward, CompiledForward):
            method, seconds = (
                "the compiled forward by leaving each part out and subtracting",
                by_leaving_out(core, forward),
            )
        elif isinstance(forward, EagerForward):
            seconds = by_modules(core, forward, torch.device(info.device))
            method = "PyTorch module by module, waiting for the device"
        else:
            raise SystemExit(f"no way is known to look into a {type(forward).__name__}")
        found.append(Where(batch, given.context, method, seconds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.report.where",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("time", "count"))
    parser.add_argument("--shape", choices=PUBLISHED)
    parser.add_argument("--config", type=Path, help="a config.json, instead of --shape")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--context", type=int, default=128)
    given = parser.parse_args()
    if (given.shape is None) == (given.config is None):
        parser.error("give either --shape or --config")
    raw = PUBLISHED[given.shape] if given.shape else json.loads(given.config.read_text())
    with torch.inference_mode():
        found = time_parts(given, raw) if given.what == "time" else count_step(raw, given.context)
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")


if __name__ == "__main__":
    main()
