"""What the compiled forward is worth: the engine as it serves, and running PyTorch instead,
interleaved in one run.

    python -m loadtests.ablation --shape gpt2 --dtype bfloat16 --batch 1,8,32

Prints the median decode step of each and its ratio to the engine as it serves; the ratios in
loadtests/NOTES.md come from here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from model.threads import set_wait_policy

set_wait_policy(os.environ)  # before torch is imported

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from model import cpu
from model.backends.cpu import CpuBackend
from model.compiled import CompiledForward
from model.config import ModelConfig
from model.cpu import RowPadding
from model.families import read_config
from model.families.published import PUBLISHED
from model.forward import EagerForward, Forward
from model.kv_cache import KVCache
from model.sampling_params import SamplingParams
from model.transformer import Transformer
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
    """What runs the model, and whether its rows are padded for deterministic mode."""

    name: str
    make_forward: Callable[[Transformer, KVCache], Forward]
    is_padded: bool = False


def torch_plain(model: Transformer, cache: KVCache) -> Forward:
    """F.linear, attention in tiles of torch's products."""
    return EagerForward(model, CpuBackend(model.config, cache))


def torch_packed(model: Transformer, cache: KVCache) -> Forward:
    """The same with weights packed for oneDNN: what serves without a C compiler."""
    cpu.pack_weights(model)
    return torch_plain(model, cache)


def torch_compiled(model: Transformer, cache: KVCache) -> Forward:
    """torch.compile of everything between the attentions. Weights stay plain: its backend does not
    take products of weights that were packed beforehand."""
    for block in model.blocks:
        block.mlp.compile(dynamic=True)
        block.mlp_norm.compile(dynamic=True)
        block.attention_norm.compile(dynamic=True)
    return torch_plain(model, cache)


VARIANTS = (
    Variant("as served: one compiled call", CompiledForward),
    Variant("torch, packed (no C compiler)", torch_packed, is_padded=True),
    Variant("torch, packed, not deterministic", torch_packed),
    Variant("torch, plain", torch_plain),
)
COMPILE_VARIANT = Variant("torch, plain, torch.compile around attention", torch_compiled)


def build(variant: Variant, shape: ModelConfig, dtype: torch.dtype, max_batch: int) -> EngineCore:
    """An engine of random weights that runs the variant."""
    length = min(PROMPT_LEN + 512, shape.max_positions)
    model = random_model(shape, length, CPU, dtype, seed=0)
    num_blocks = max_batch * -(-length // BLOCK_SIZE)
    cache = KVCache.allocate(shape, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=dtype)
    forward = variant.make_forward(model, cache)
    padding = cpu.choose_padding(model) if variant.is_padded else None
    limits = Limits(max_batch, max(512, max_batch), model.max_positions)
    runner = Runner(forward, cache, shape, (), CPU, padding=padding or RowPadding())
    return EngineCore(Scheduler(limits, BlockPool(num_blocks, BLOCK_SIZE)), runner)


def decode_step_ms(core: EngineCore, batch: int, num_steps: int) -> float:
    """Median of `num_steps` steps in which `batch` sequences decode one token each."""
    generator = torch.Generator().manual_seed(batch)
    params = SamplingParams(max_tokens=num_steps + 4, temperature=0.0, ignore_eos=True)
    vocab_size = core.runner.config.vocab_size
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
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too, and how long it takes to start"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches = [int(batch) for batch in arguments.batch.split(",")]
    shape = read_config(PUBLISHED[arguments.shape])
    dtype = getattr(torch, arguments.dtype)
    variants = (*VARIANTS, COMPILE_VARIANT) if arguments.compile else VARIANTS
    cores = {v.name: build(v, shape, dtype, max(batches)) for v in variants}
    if arguments.compile:
        began = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                decode_step_ms(cores[COMPILE_VARIANT.name], batch, 1)
        print(f"torch.compile: first steps took {time.perf_counter() - began:.1f} s")
    times: dict[tuple[str, int], list[float]] = {}
    with torch.inference_mode():
        for _ in track(range(arguments.rounds), "rounds", console=Console(stderr=True)):
            for batch in batches:
                for name, core in cores.items():
                    step_ms = decode_step_ms(core, batch, arguments.steps)
                    times.setdefault((name, batch), []).append(step_ms)
    title = f"decode step, {arguments.shape} {arguments.dtype}: ms (times as served)"
    table = Table(title=title)
    table.add_column("variant")
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right")
    for name in cores:
        cells = []
        for batch in batches:
            step_ms = statistics.median(times[name, batch])
            ratio = statistics.median(
                ours / served
                for ours, served in zip(
                    times[name, batch], times[VARIANTS[0].name, batch], strict=True
                )
            )
            cells.append(f"{step_ms:.2f} ({ratio:.2f}x)")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
