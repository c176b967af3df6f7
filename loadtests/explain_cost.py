"""What it costs a step that some of its rows are watched, and what a recording costs.

    python -m loadtests.explain_cost --shape gpt2 --dtype bfloat16 --batch 32 --watched 1,8,32
    python -m loadtests.explain_cost --shape bundled

Decode steps over a full cache, the plain and the watched ones taking turns: forward, weights of
the watched rows, their strongest positions and those of `--heads` heads each. Without sampling, so
the share of a whole step is less. Then a recording of `--record` tokens: the time of all its
pieces and of the longest, which is what a stream beside it waits for.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from model.threads import set_wait_policy

set_wait_policy(os.environ)  # before torch is imported

import torch
from rich.console import Console
from rich.table import Table

from model.batch import ForwardBatch
from model.checkpoint import load_checkpoint
from model.checkpoint_files import bundled_checkpoint
from model.explain.attended import watch
from model.explain.record import record
from model.families import read_config
from model.families.published import PUBLISHED
from model.forward import Forward
from model.kv_cache import KVCache
from model.select import select_forward
from model.transformer import Transformer
from service.bench.random_weights import random_model
from service.engine.start import DTYPES

BLOCK_SIZE = 32
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.explain_cost", description=__doc__)
    parser.add_argument("--shape", default="gpt2", help="a published model, or `bundled`")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=480)
    parser.add_argument("--watched", default="1,8,32", help="how many rows of the batch")
    parser.add_argument("--heads", type=int, default=8, help="chosen heads of each")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="the process's CPU time instead of the clock's: for a busy machine, with --threads 1",
    )
    parser.add_argument("--record", type=int, default=256, help="tokens; 0: no recording")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = make_model(given)
    config = model.config
    num_blocks = -(-given.context // BLOCK_SIZE)
    cache = KVCache.allocate(
        config,
        num_blocks=num_blocks * given.batch,
        block_size=BLOCK_SIZE,
        dtype=DTYPES[given.dtype],
    )
    generator = torch.Generator().manual_seed(0)
    for pages in (cache.keys, cache.values):
        pages.normal_(generator=generator)
    selection = select_forward(
        model, cache, deterministic=True, weights="int8" if given.dtype == "int8" else "plain"
    )
    console = Console()
    title = f"{given.shape}, {given.dtype}, {selection.name}, context {given.context}"
    console.print(watch_table(given, selection.forward, model, title))
    if given.record:
        console.print(recording_line(model, given.record))


def make_model(given: argparse.Namespace) -> Transformer:
    dtype = DTYPES[given.dtype]
    if given.shape == "bundled":
        return load_checkpoint(Path(bundled_checkpoint()), dtype=dtype).model
    return random_model(read_config(PUBLISHED[given.shape]), given.context + 8, CPU, dtype, seed=0)


def decode_batch(given: argparse.Namespace, vocab_size: int) -> ForwardBatch:
    """One token of every sequence, each at the end of its context."""
    size, blocks = given.batch, -(-given.context // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(1)
    tables = torch.randperm(size * blocks, generator=generator).view(size, blocks)
    last = given.context - 1
    return ForwardBatch(
        input_ids=torch.randint(vocab_size, (size,), generator=generator),
        positions=torch.full((size,), last),
        query_start=torch.arange(size + 1),
        context_lens=torch.full((size,), given.context),
        block_tables=tables,
        slot_mapping=tables[:, last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE,
        logits_rows=torch.arange(size),
        query_start_host=tuple(range(size + 1)),
        context_lens_host=(given.context,) * size,
    )


@torch.inference_mode()
def watch_table(
    given: argparse.Namespace, forward: Forward, model: Transformer, title: str
) -> Table:
    config = model.config
    plain = decode_batch(given, config.vocab_size)
    heads = [
        (i % config.num_layers, i // config.num_layers % config.num_heads)
        for i in range(given.heads)
    ]
    clock = time.process_time if given.cpu_time else time.perf_counter
    counts = [0, *(int(count) for count in given.watched.split(","))]
    times: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(given.rounds + 3):
        for count in counts:
            began = clock()
            if count:
                rows = dict.fromkeys(range(count), heads)
                watching = watch(config, rows, given.context, BLOCK_SIZE)
                forward(replace(plain, watch=watching))
            else:
                forward(plain)
            if number >= 3:  # the first ones warm up
                times[count].append(clock() - began)
    table = Table(title=f"{title}, batch {given.batch}", title_justify="left")
    for heading in ("watched rows", "step, median", "more than plain", "a row", "throughput"):
        table.add_column(heading, justify="right")
    base = median(times[0])
    for count in counts:
        more = median(times[count]) - base
        table.add_row(
            str(count),
            f"{median(times[count]) * 1e3:.2f} ms",
            f"{more * 1e3:.2f} ms" if count else "",
            f"{more / count * 1e6:.0f} us" if count else "",
            f"{base / median(times[count]):.1%}",
        )
    return table


def recording_line(model: Transformer, num_tokens: int) -> str:
    num_tokens = min(num_tokens, model.max_positions)
    ids = torch.randint(model.config.vocab_size, (num_tokens,))
    pieces: list[float] = []
    for _ in range(2):  # the first one warms up
        pieces, last = [], time.perf_counter()
        for _ in record(model, ids):
            now = time.perf_counter()
            pieces.append(now - last)
            last = now
    return (
        f"recording {num_tokens} tokens: {sum(pieces):.2f} s in {len(pieces)} pieces, "
        f"median {median(pieces) * 1e3:.1f} ms, longest {max(pieces) * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
