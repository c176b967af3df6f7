"""The parts of a run, each in a process of its own: one that fails or hangs costs only itself.

    python -m loadtests.gpu.sections NAME --out FILE [--dry-run]

writes what it measured as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.threads import set_wait_policy

set_wait_policy(os.environ)  # before torch is imported

import torch

from loadtests.gpu.cases import CASES, DETERMINISTIC, Case, tiny
from model.families import read_config
from model.families.published import PUBLISHED
from model.sampling_params import SamplingParams
from service.bench.measure import Run, drive
from service.bench.random_weights import start_random_engine
from service.bench.workload import Arrival, OpenLoop
from service.engine.core import EngineCore
from service.engine.messages import EngineConfig, Submit
from service.engine.start import start_engine

BUNDLED = Path(__file__).parents[2] / "model" / "checkpoints" / "stories"
Json = dict[str, Any]


def engine_for(case: Case, is_dry: bool) -> EngineCore:
    """An engine as it is served, around random weights, with room for the case."""
    longest = case.prompt_len[1] + case.output_len[1]
    core, _ = start_random_engine(
        read_config(PUBLISHED[case.shape]),
        EngineConfig(
            model_dir=case.shape,
            device="cpu" if is_dry else "cuda",
            dtype="bfloat16",
            max_model_len=longest,
            max_num_seqs=case.num_requests,
            max_batched_tokens=max(64 if is_dry else 8192, case.num_requests),
            max_step_ratio=0.0,
            deterministic=case.deterministic,
        ),
        needed_len=longest,
        seed=0,
    )
    return core


def requests_of(case: Case, vocab_size: int, run: int) -> list[Arrival]:
    """All at once; another run has other prompts, so that none is found in the cache."""
    rng = random.Random(f"{case.name} {run}")
    return [
        Arrival(
            0.0,
            Submit(
                index,
                [rng.randrange(vocab_size) for _ in range(rng.randint(*case.prompt_len))],
                SamplingParams(
                    max_tokens=rng.randint(*case.output_len), temperature=0.0, ignore_eos=True
                ),
            ),
        )
        for index in range(case.num_requests)
    ]


def rate_of(case: Case, run: Run) -> float:
    """The case's tokens a second."""
    if case.kind == "prefill":
        return sum(request.prompt_len for request in run.requests) / run.elapsed_s
    if case.kind == "offline":
        return sum(len(request.token_times_s) for request in run.requests) / run.elapsed_s
    full = [s for s in run.steps if s.is_decode and len(s.contexts) == case.num_requests]
    return sum(len(s.contexts) for s in full) / sum(s.profile.step_s for s in full)


def measure_case(case: Case, is_dry: bool) -> Json:
    """One warm run, a small one where a run is long, and then measured ones while time lasts."""
    began = time.monotonic()
    core = engine_for(case, is_dry)
    loaded = time.monotonic()
    vocab_size = core.runner.config.vocab_size
    warm = requests_of(case, vocab_size, -1)[:8]
    drive(core, OpenLoop(warm, len(warm)))
    rates, steps = [], []
    while len(rates) < 3:
        started = time.monotonic()
        requests = requests_of(case, vocab_size, len(rates))
        run = drive(core, OpenLoop(requests, case.num_requests))
        rates.append(rate_of(case, run))
        steps += [s.profile for s in run.steps if s.is_decode]
        took = time.monotonic() - started
        if time.monotonic() - began + 1.5 * took > case.limit_s - 10:
            break
    median = sorted(rates)[len(rates) // 2]
    return {
        "tokens_per_s": median,
        "rates": rates,
        "start_s": loaded - began,
        "preemptions": core.stats().preemptions,
        "blocks": core.stats().total_blocks,
        "decode_step_ms": _median_ms([p.step_s for p in steps]),
        "host_build_ms": _median_ms([p.build_s for p in steps]),
        "host_launch_ms": _median_ms([p.forward_s for p in steps]),
        "host_wait_ms": _median_ms([p.sample_s for p in steps]),
    }


def _median_ms(seconds: list[float]) -> float | None:
    return 1e3 * sorted(seconds)[len(seconds) // 2] if seconds else None


def idle_share(is_dry: bool) -> Json:
    """Of the time between the first and the last kernel of 40 decode steps of 64 sequences, how
    much no kernel ran in. On a CPU there is no device to be idle; the steps run all the same."""
    case = Case("idle", "qwen3-0.6b", "decode", 64, (448, 448), (96, 96), 0, 0, 0)
    core = engine_for(tiny(case) if is_dry else case, is_dry)
    chosen = tiny(case) if is_dry else case
    for arrival in requests_of(chosen, core.runner.config.vocab_size, 0):
        core.add(arrival.request)
    while any(s.num_output < 2 for s in core.sequences.values()):
        core.step()
    if is_dry:
        while core.has_work:
            core.step()
        return {"idle_share": None}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(40):
            core.step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {"idle_share": 1 - busy / (until - spans[0][0]), "kernels": len(spans)}


def greedy_equal(is_dry: bool) -> Json:
    """Greedy tokens of the bundled checkpoint in float32: the device against the CPU."""
    prompts = [[5, 9, 200, 31], list(range(1, 90)), [7] * 40, [1]]
    texts = []
    for device in ("cpu", "cpu" if is_dry else "cuda"):
        config = EngineConfig(str(BUNDLED), device=device, dtype="float32", max_num_seqs=4)
        core, _ = start_engine(config)
        params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            core.add(Submit(index, prompt, params))
        tokens: dict[int, list[int]] = {}
        while core.has_work:
            for output in core.step():
                tokens.setdefault(output.id, []).extend(output.token_ids)
        texts.append(tokens)
    return {"equal": texts[0] == texts[1], "tokens": sum(map(len, texts[0].values()))}


def start_to_first_token(is_dry: bool) -> Json:
    """An 8B checkpoint in the page cache: from a process that has its libraries to a token."""
    from loadtests.gpu.checkpoint import write_random

    with tempfile.TemporaryDirectory() as folder:
        written = time.monotonic()
        shape = "stories15m" if is_dry else "llama-3.1-8b"
        write_random(shape, Path(folder), "cpu" if is_dry else "cuda")
        began = time.monotonic()
        core, _ = start_engine(
            EngineConfig(
                folder,
                device="cpu" if is_dry else "cuda",
                dtype="bfloat16",
                max_model_len=64 if is_dry else 4096,
            )
        )
        core.add(Submit(1, [1, 2, 3], SamplingParams(max_tokens=1, ignore_eos=True)))
        while core.has_work:
            core.step()
        return {"first_token_s": time.monotonic() - began, "write_s": began - written}


def transformers_batching(is_dry: bool) -> Json:
    """transformers' continuous batching on the work of the 256 requests of mixed lengths. Its
    calls take one number of tokens for all: requests of equal outputs, the mean, stand for it."""
    import transformers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    transformers.logging.set_verbosity_error()
    case = next(c for c in CASES if c.output_len == (100, 1024))
    case = tiny(case) if is_dry else case
    fields = {k: v for k, v in PUBLISHED[case.shape].items() if k != "model_type"}
    config = AutoConfig.for_model(str(PUBLISHED[case.shape]["model_type"]), **fields)
    with torch.device("cpu" if is_dry else "cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    vocab_size = int(str(fields["vocab_size"]))
    prompts = [a.request.prompt_token_ids for a in requests_of(case, vocab_size, 0)]
    length = sum(case.output_len) // 2
    generation = GenerationConfig(
        do_sample=False, max_new_tokens=length, eos_token_id=-1, pad_token_id=0
    )
    # As transformers chooses on a GPU; on a CPU it must be told how much memory to take.
    batching = ContinuousBatchingConfig(allow_block_sharing=False)
    if is_dry:
        batching = ContinuousBatchingConfig(
            num_blocks=64,
            max_batch_tokens=64,
            max_memory_percent=0.5,
            use_cuda_graph=False,
            allow_block_sharing=False,
        )
    began = time.perf_counter()
    outputs = model.generate_batch(
        prompts,
        generation_config=generation,
        continuous_batching_config=batching,
        progress_bar=False,
    )
    elapsed_s = time.perf_counter() - began
    tokens = sum(len(answer.generated_tokens) for answer in outputs.values())
    return {"tokens_per_s": tokens / elapsed_s, "tokens": tokens}


SECTIONS: dict[str, Callable[[bool], Json]] = {
    "idle share": idle_share,
    "greedy tokens": greedy_equal,
    "start": start_to_first_token,
    "transformers": transformers_batching,
}
MEASURED = {case.name: case for case in CASES + DETERMINISTIC}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu.sections", description=__doc__)
    parser.add_argument("name", choices=[*MEASURED, *SECTIONS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if (case := MEASURED.get(given.name)) is not None:
        found = measure_case(tiny(case) if given.dry_run else case, given.dry_run)
    else:
        found = SECTIONS[given.name](given.dry_run)
    given.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
