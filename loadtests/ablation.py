"""What each part of the CPU path is worth: the engine as it serves, and with one part
replaced by its plain twin, interleaved in one run.

    python -m loadtests.ablation --shape gpt2 --dtype bfloat16 --batch 1,8,32

Prints the median decode step of each and its ratio to the engine as it serves; the ratios in
loadtests/NOTES.md come from here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass

from model.threads import set_wait_policy

set_wait_policy(os.environ)  # before torch is imported

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from model import cpu
from model.backends.cpu import CpuBackend
from model.backends.select import select_backend
from model.config import ModelConfig
from model.cpu import RowPadding
from model.families import read_config
from model.families.published import PUBLISHED
from model.kv_cache import KVCache
from model.sampling_params import SamplingParams
from service.bench.random_weights import random_model
from service.engine.blocks import BlockPool
from service.engine.core import EngineCore
from service.engine.messages import Submit
from service.engine.runner import Runner
from service.engine.scheduler import Limits, Scheduler

BLOCK_SIZE = 32
PROMPT_LEN = 128
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """Which parts are on."""

    name: str
    packed: bool = True
    compiled_layers: bool = True
    compiled_attention: bool = True
    padded: bool = True


VARIANTS = (
    Variant("as served"),
    Variant("weights not packed", packed=False),
    Variant("attention in torch", compiled_attention=False),
    Variant("norms and SwiGLU in torch", compiled_layers=False),
    Variant("rows not padded (not deterministic)", padded=False),
)


def build(variant: Variant, shape: ModelConfig, dtype: torch.dtype, max_batch: int) -> EngineCore:
    """An engine of random weights with the variant's parts."""
    length = PROMPT_LEN + 512
    model = random_model(shape, min(length, shape.max_positions), CPU, dtype, seed=0)
    if variant.packed:
        cpu.pack_weights(model)
    if variant.compiled_layers:
        cpu.use_compiled_kernels(model)
    num_blocks = max_batch * -(-length // BLOCK_SIZE)
    cache = KVCache.allocate(shape, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=dtype)
    attention = (
        select_backend(shape, cache).backend
        if variant.compiled_attention
        else CpuBackend(shape, cache)
    )
    padding = cpu.choose_padding(model) if variant.padded else None
    limits = Limits(max_batch, max(512, max_batch), model.max_positions)
    runner = Runner(model, attention, BLOCK_SIZE, (), CPU, padding=padding or RowPadding())
    return EngineCore(Scheduler(limits, BlockPool(num_blocks, BLOCK_SIZE)), runner)


def decode_step_ms(core: EngineCore, batch: int, num_steps: int) -> float:
    """Median of `num_steps` steps in which `batch` sequences decode one token each."""
    generator = torch.Generator().manual_seed(batch)
    params = SamplingParams(max_tokens=num_steps + 4, temperature=0.0, ignore_eos=True)
    vocab_size = core.runner.model.config.vocab_size
    for sequence_id in range(batch):
        prompt = torch.randint(vocab_size, (PROMPT_LEN,), generator=generator).tolist()
        core.add(Submit(sequence_id, prompt, params))
    while any(sequence.num_output < 2 for sequence in core.sequences.values()):
        core.step()
    times = []
    for _ in range(num_steps):
        began = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - began)
    for sequence_id in range(batch):
        core.abort(sequence_id)
    return 1e3 * statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=PUBLISHED, default="gpt2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", default="1,8,32", help="sequences in a step, a list")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="decode steps a measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches = [int(batch) for batch in arguments.batch.split(",")]
    shape = read_config(PUBLISHED[arguments.shape])
    dtype = getattr(torch, arguments.dtype)
    cores = {v.name: build(v, shape, dtype, max(batches)) for v in VARIANTS}
    times: dict[tuple[str, int], list[float]] = {}
    with torch.inference_mode():
        for _ in track(range(arguments.rounds), "rounds", console=Console(stderr=True)):
            for batch in batches:
                for name, core in cores.items():
                    step_ms = decode_step_ms(core, batch, arguments.steps)
                    times.setdefault((name, batch), []).append(step_ms)
    table = Table(title=f"decode step, {arguments.shape} {arguments.dtype}: ms (times as served)")
    table.add_column("variant")
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right")
    for name in cores:
        cells = []
        for batch in batches:
            step_ms = statistics.median(times[name, batch])
            ratio = statistics.median(
                ours / served
                for ours, served in zip(times[name, batch], times["as served", batch], strict=True)
            )
            cells.append(f"{step_ms:.2f} ({ratio:.2f}x)")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
