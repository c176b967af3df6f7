"""What the engine promises, measured on it alone, without HTTP.

    python -m loadtests.engine prefix --shape gpt2 --dtype bfloat16
    python -m loadtests.engine gaps --shape smollm-135m --dtype bfloat16
    python -m loadtests.engine sweep --shape smollm-135m --dtype bfloat16 --out DIR
    python -m loadtests.engine company --forward torch
    python -m loadtests.engine neighbours --shape stories15m --dtype float32 --batch 1

prefix: time to first token of requests that share the beginning of their prompt, with the cache
and without. gaps: the gaps between tokens of running streams while a long prompt arrives. sweep:
throughput against concurrency and context, beside the roofline; a table, JSON and a picture.
company: how often a greedy text of the bundled model depends on what else is in the batch.
neighbours: how long decode steps take beside other processes that compute without end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median

from model.threads import set_wait_policy

set_wait_policy(os.environ)  # before torch is imported

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from model import cpu
from model.backends.cpu import CpuBackend
from model.checkpoint import load_checkpoint
from model.cpu import RowPadding
from model.families import read_config
from model.families.published import PUBLISHED
from model.forward import EagerForward
from model.hub import resolve_model
from model.kv_cache import KVCache
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from service.bench.random_weights import random_model
from service.engine.blocks import BlockPool
from service.engine.core import EngineCore
from service.engine.messages import EngineConfig, Submit
from service.engine.roofline import measure_roofline
from service.engine.runner import Runner
from service.engine.scheduler import Limits, Scheduler
from service.engine.start import DTYPES, assemble
from service.engine.traffic import traffic_of

CPU = torch.device("cpu")
ANSWER = 60  # tokens in the sweep: the first sequence still runs when the last one is measured


def engine(
    given: argparse.Namespace, context: int, max_num_seqs: int, max_step_ratio: float = 2.0
) -> EngineCore:
    """As it serves, on random weights; the cache holds `max_num_seqs` whole contexts."""
    shape = read_config(PUBLISHED[given.shape])
    if context > shape.max_positions:
        raise SystemExit(f"{given.shape} has {shape.max_positions} positions; {context} are needed")
    model = random_model(shape, context, CPU, DTYPES[given.dtype], seed=0)
    blocks = max_num_seqs * -(-context // 32)
    per_block = 2 * shape.num_layers * shape.kv_size * 32 * DTYPES[given.dtype].itemsize
    config = EngineConfig(
        "",
        dtype=given.dtype,
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max(1024, max_num_seqs),
        kv_cache_bytes=blocks * per_block,
        threads=given.threads,
        max_step_ratio=max_step_ratio,
    )
    core, _ = assemble(model, (), config, began=time.monotonic())
    return core


def ids(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(count)]


def submit(core: EngineCore, id_: int, prompt: list[int], max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    core.add(Submit(id_, prompt, params))


def until_idle(core: EngineCore) -> dict[int, float]:
    """Step to the end; when each sequence had its first token, in seconds from now."""
    began = time.perf_counter()
    first: dict[int, float] = {}
    while core.has_work:
        for output in core.step():
            if output.token_ids:
                first.setdefault(output.id, time.perf_counter() - began)
    return first


def prefix(given: argparse.Namespace) -> None:
    core = engine(given, given.prefix_len + given.own_len + 8, given.requests + 1)
    vocab_size, rng = core.runner.config.vocab_size, random.Random(given.seed)
    ratios = []
    for number in range(given.rounds):
        times = []
        for is_shared in (False, True):
            shared = ids(rng, vocab_size, given.prefix_len)
            if is_shared:  # as a system prompt is in the cache of a server that has been running
                submit(core, -1, shared, 1)
                until_idle(core)
            for id_ in range(given.requests):
                start = shared if is_shared else ids(rng, vocab_size, given.prefix_len)
                submit(core, id_, start + ids(rng, vocab_size, given.own_len), 1)
            times.append(median(until_idle(core).values()))
        ratios.append(times[0] / times[1])
        print(
            f"round {number + 1}: TTFT p50 without {times[0]:.3f} s, with {times[1]:.3f} s, "
            f"{ratios[-1]:.1f}-fold",
            flush=True,
        )
    print(f"median {median(ratios):.1f}-fold")


def gaps(given: argparse.Namespace) -> None:
    core = engine(given, given.prompt_len + 40, given.streams + 1)
    vocab_size, rng = core.runner.config.vocab_size, random.Random(given.seed)
    worst = []
    for number in range(given.rounds):
        for id_ in range(given.streams):
            submit(core, id_, ids(rng, vocab_size, 64), given.prompt_len - 64)
        for _ in range(given.streams * 2 + 40):
            core.step()
        quiet = [_step_s(core) for _ in range(20)]
        submit(core, 1000, ids(rng, vocab_size, given.prompt_len), 1)
        beside = []
        while 1000 in core.sequences:
            beside.append(_step_s(core))
        after = [_step_s(core) for _ in range(20)]
        usual = median(quiet + after)
        worst.append(max(beside) / usual)
        print(
            f"round {number + 1}: gaps median {1e3 * usual:.1f} ms; {len(beside)} steps with the "
            f"prompt, {sum(beside):.2f} s: median {1e3 * median(beside):.1f}, "
            f"longest {1e3 * max(beside):.1f} ms, {worst[-1]:.1f}x",
            flush=True,
        )
        for id_ in range(given.streams):
            core.abort(id_)
    print(f"longest gap, median of the rounds: {median(worst):.1f}x the usual one")


def _step_s(core: EngineCore) -> float:
    began = time.perf_counter()
    core.step()
    return time.perf_counter() - began


def sweep(given: argparse.Namespace) -> None:
    shape, dtype = read_config(PUBLISHED[given.shape]), DTYPES[given.dtype]
    points = [(n, 128) for n in (1, 2, 4, 8, 16, 32, 64)]
    points += [(8, context) for context in (256, 512, 1024, 2048) if context <= shape.max_positions]
    traffic = traffic_of(shape, dtype, int8=given.dtype == "int8")
    # Prompts in whole steps: in small chunks the first sequences are done before the last begin,
    # where they are too many to begin together.
    longest = min(max(c for _, c in points) + ANSWER, shape.max_positions)
    core = engine(given, longest, 64, max_step_ratio=0.0)
    rng, rows = random.Random(given.seed), []
    for num_seqs, context in track(points, console=Console(stderr=True)):
        prompt_len = min(context, longest - ANSWER)
        for id_ in range(num_seqs):
            submit(core, id_, ids(rng, shape.vocab_size, prompt_len), ANSWER)
        while any(one.num_output < 2 for one in core.sequences.values()):
            core.step()
        step_s = median(_step_s(core) for _ in range(given.steps))
        if core.last_step.num_decodes != num_seqs:
            raise SystemExit(f"{core.last_step.num_decodes} of {num_seqs} sequences were running")
        for id_ in range(num_seqs):
            core.abort(id_)
        # Each time: the memory of a shared machine is not the same from one minute to the next.
        roofline = measure_roofline(CPU, dtype)
        least_s = roofline.least_s(*traffic.decode([prompt_len + 20] * num_seqs))
        rows.append(
            {
                "sequences": num_seqs,
                "context": prompt_len,
                "tokens_per_s": num_seqs / step_s,
                "roof_tokens_per_s": num_seqs / least_s,
                "read_bytes_per_s": roofline.read_bytes_per_s,
                "flops_per_s": roofline.flops_per_s,
            }
        )
    table = Table(title=f"{given.shape} {given.dtype}: decode, tokens/s")
    for heading in ("sequences", "context", "tokens/s", "roof", "of the roof", "GB/s", "GFLOP/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        speed, roof = row["tokens_per_s"], row["roof_tokens_per_s"]
        cells = (f"{row['sequences']}", f"{row['context']}", f"{speed:,.0f}", f"{roof:,.0f}")
        machine = (f"{row['read_bytes_per_s'] / 1e9:.0f}", f"{row['flops_per_s'] / 1e9:.0f}")
        table.add_row(*cells, f"{100 * speed / roof:.0f} %", *machine)
    Console(width=100).print(table)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        name = f"sweep-{given.shape}-{given.dtype}"
        (given.out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        _draw(rows, f"{given.shape}, {given.dtype}, 2 cores", given.out / f"{name}.png")


def _draw(rows: list[dict[str, float]], title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=False)
    panels = (
        (left, "sequences", [row for row in rows if row["context"] == 128]),
        (right, "context", [row for row in rows if row["sequences"] == 8]),
    )
    for axes, name, chosen in panels:
        x = [row[name] for row in chosen]
        axes.loglog(x, [row["roof_tokens_per_s"] for row in chosen], "--", label="roofline")
        axes.loglog(x, [row["tokens_per_s"] for row in chosen], "o-", label="Vitrine")
        axes.set_xlabel(name)
        axes.set_xticks(x, [f"{int(value)}" for value in x])
        axes.grid(alpha=0.3)
    left.set_ylabel("decode, tokens/s")
    left.set_title("context 128")
    right.set_title("8 sequences")
    left.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def neighbours(given: argparse.Namespace) -> None:
    prompt_len, most = 64, 2
    core = engine(given, prompt_len + given.steps + 1, given.batch)
    vocab_size, rng = core.runner.config.vocab_size, random.Random(given.seed)
    times: dict[int, list[float]] = {}
    for number in range(given.rounds):
        for count in range(most + 1):
            for id_ in range(given.batch):
                submit(core, id_, ids(rng, vocab_size, prompt_len), given.steps + 1)
            while any(sequence.num_output < 1 for sequence in core.sequences.values()):
                core.step()
            with _computing(count):
                steps = []
                while core.has_work:
                    steps.append(_step_s(core))
            times.setdefault(count, []).append(mean(steps))
        print(f"round {number + 1}: {_list_ms(times, number)} ms a step, mean", flush=True)
    for count in range(1, most + 1):
        ratios = [beside / quiet for beside, quiet in zip(times[count], times[0], strict=True)]
        print(f"beside {count}: {median(ratios):.2f} times as long, median of the rounds")


def _list_ms(times: dict[int, list[float]], number: int) -> str:
    return ", ".join(f"beside {count} {1e3 * one[number]:.2f}" for count, one in times.items())


@contextmanager
def _computing(count: int) -> Iterator[None]:
    """So many other processes compute meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def company(given: argparse.Namespace) -> None:
    directory = resolve_model(None, None)
    tokenizer = Tokenizer.from_directory(directory)
    names = ("Tom", "Lily", "Ben", "Mia", "the cat", "the dog", "a bird", "Anna")
    places = ("went to the park", "found a box", "was sad", "saw a big tree")
    prompts = [tokenizer.encode(f"One day, {who} {what}") for who in names for what in places]
    core = _bundled(given, directory)
    alone = {}
    for id_, prompt in enumerate(prompts):
        submit(core, id_, prompt, given.tokens)
        alone |= _texts(core)
    core = _bundled(given, directory)
    for id_, prompt in enumerate(prompts):
        submit(core, id_, prompt, given.tokens)
    together = _texts(core)
    differ = [id_ for id_ in alone if alone[id_] != together[id_]]
    first = [
        next(i for i, (a, b) in enumerate(zip(alone[id_], together[id_], strict=True)) if a != b)
        for id_ in differ
    ]
    where = f", first at token {min(first)} .. {max(first)}" if first else ""
    print(
        f"{given.forward} {given.dtype}: {len(differ)} of {len(prompts)} greedy texts of "
        f"{given.tokens} tokens differ in the company of {len(prompts) - 1} others{where}"
    )


def _bundled(given: argparse.Namespace, directory: Path) -> EngineCore:
    checkpoint = load_checkpoint(directory, dtype=DTYPES[given.dtype])
    if given.forward == "served":
        config = EngineConfig("", dtype=given.dtype, deterministic=False, threads=given.threads)
        return assemble(checkpoint.model, (), config, began=time.monotonic())[0]
    torch.set_num_threads(given.threads)
    shape = checkpoint.config
    cache = KVCache.allocate(shape, num_blocks=512, block_size=32, dtype=DTYPES[given.dtype])
    cpu.pack_weights(checkpoint.model)
    forward = EagerForward(checkpoint.model, CpuBackend(shape, cache))
    runner = Runner(forward, cache, shape, (), CPU, padding=RowPadding())
    limits = Limits(64, 1024, shape.max_positions)
    return EngineCore(Scheduler(limits, BlockPool(512, 32)), runner)


def _texts(core: EngineCore) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    while core.has_work:
        for output in core.step():
            tokens.setdefault(output.id, []).extend(output.token_ids)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = parser.add_subparsers(dest="name", required=True)
    for run in (prefix, gaps, sweep, company, neighbours):
        one = names.add_parser(run.__name__)
        one.set_defaults(run=run)
        if run is not company:
            one.add_argument("--shape", choices=PUBLISHED, default="gpt2")
        one.add_argument("--dtype", choices=DTYPES, default="bfloat16")
        one.add_argument("--threads", type=int, default=os.cpu_count())
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--rounds", type=int, default=3)
    names.choices["prefix"].add_argument("--requests", type=int, default=32)
    names.choices["prefix"].add_argument("--prefix-len", type=int, default=512)
    names.choices["prefix"].add_argument("--own-len", type=int, default=16)
    names.choices["gaps"].add_argument("--streams", type=int, default=16)
    names.choices["gaps"].add_argument("--prompt-len", type=int, default=2000)
    names.choices["sweep"].add_argument("--steps", type=int, default=20)
    names.choices["sweep"].add_argument("--out", type=Path)
    names.choices["neighbours"].add_argument("--batch", type=int, default=1)
    names.choices["neighbours"].add_argument("--steps", type=int, default=180)
    names.choices["company"].add_argument(
        "--forward", choices=("served", "torch"), default="served"
    )
    names.choices["company"].add_argument("--tokens", type=int, default=256)
    given = parser.parse_args()
    with torch.inference_mode():
        given.run(given)


if __name__ == "__main__":
    main()
