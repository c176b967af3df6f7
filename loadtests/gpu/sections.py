"""The parts of a run, each in a process of its own: one that fails or hangs costs only itself.

    python -m loadtests.gpu.sections NAME --out FILE [--dry-run]

writes what it measured as JSON, and what was measured so far on its way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.threads import set_wait_policy

set_wait_policy(os.environ)  # before torch is imported

import torch

from loadtests.gpu.cases import CASES, COMPARED, DETERMINISTIC, Case, tiny
from loadtests.gpu.idle import idle_of
from model.families import read_config
from model.families.published import PUBLISHED
from model.sampling_params import SamplingParams
from service.bench.measure import Run, drive
from service.bench.random_weights import start_random_engine
from service.bench.workload import Arrival, OpenLoop
from service.engine.core import EngineCore
from service.engine.messages import EngineConfig, Submit
from service.engine.profile import StepProfile
from service.engine.start import start_engine

BUNDLED = Path(__file__).parents[2] / "model" / "checkpoints" / "stories"
Json = dict[str, Any]
Tell = Callable[[Json], None]  # what was measured so far


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


def measure_case(case: Case, is_dry: bool, tell: Tell) -> Json:
    """One warm run of a few requests, and then measured ones while time lasts."""
    began = time.monotonic()
    core = engine_for(case, is_dry)
    loaded = time.monotonic()
    vocab_size = core.runner.config.vocab_size
    warm = requests_of(case, vocab_size, -1)[:8]
    drive(core, OpenLoop(warm, len(warm)))
    rates: list[float] = []
    steps: list[StepProfile] = []
    while True:
        started = time.monotonic()
        requests = requests_of(case, vocab_size, len(rates))
        run = drive(core, OpenLoop(requests, case.num_requests))
        rates.append(rate_of(case, run))
        steps += [s.profile for s in run.steps if s.is_decode]
        stats = core.stats()
        found = {
            "tokens_per_s": sorted(rates)[len(rates) // 2],
            "rates": rates,
            "start_s": loaded - began,
            "capture_s": getattr(core.runner, "capture_s", None),
            "preemptions": stats.preemptions,
            "memory_shortages": stats.memory_shortages,
            "blocks": stats.total_blocks,
            "decode_step_ms": _median_ms([p.step_s for p in steps]),
            "host_build_ms": _median_ms([p.build_s for p in steps]),
            "host_launch_ms": _median_ms([p.forward_s for p in steps]),
            "host_wait_ms": _median_ms([p.sample_s for p in steps]),
        }
        tell(found)
        took = time.monotonic() - started
        if len(rates) == 3 or time.monotonic() - began + 1.5 * took > case.limit_s - 3:
            return found


def _median_ms(seconds: list[float]) -> float | None:
    return 1e3 * sorted(seconds)[len(seconds) // 2] if seconds else None


def idle_share(is_dry: bool, _: Tell) -> Json:
    """How much of the time of 40 decode steps of 64 sequences no kernel runs in. On a CPU there is
    no device to be idle; the steps run all the same."""
    case = Case("idle", "qwen3-0.6b", "decode", 64, (448, 448), (96, 96), 0, 0, 0)
    chosen = tiny(case) if is_dry else case
    core = engine_for(chosen, is_dry)
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
    return idle_of(
        [
            (event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
    )


def greedy_equal(is_dry: bool, _: Tell) -> Json:
    """Tokens of the bundled checkpoint in float32, on the device and on the CPU: greedy, and
    drawn with a seed. Where they part, and how often."""
    on_cpu = _tokens_of("cpu", deterministic=True)
    found: Json = {}
    for name, deterministic in (("deterministic", True), ("fastest", False)):
        ours = _tokens_of("cpu" if is_dry else "cuda", deterministic=deterministic)
        parted = {
            index: next(i for i, pair in enumerate(pairs) if pair[0] != pair[1])
            for index, theirs in on_cpu.items()
            if (pairs := list(zip(theirs, ours[index], strict=True))) and theirs != ours[index]
        }
        found[name] = {"equal": not parted, "parted_at": parted}
    found["equal"] = all(found[name]["equal"] for name in ("deterministic", "fastest"))
    return found | {"tokens": sum(map(len, on_cpu.values()))}


def _tokens_of(device: str, *, deterministic: bool) -> dict[int, list[int]]:
    """Of eight requests, the last four of which are sampled."""
    prompts = [[5, 9, 200, 31], list(range(1, 90)), [7] * 40, [1]]
    core, _ = start_engine(
        EngineConfig(
            str(BUNDLED),
            device=device,
            dtype="float32",
            max_num_seqs=8,
            deterministic=deterministic,
            kv_cache_bytes=2**28,
        )
    )
    for index, prompt in enumerate(prompts * 2):
        temperature = 0.0 if index < len(prompts) else 0.8
        params = SamplingParams(
            max_tokens=64, temperature=temperature, seed=index, top_p=0.95, ignore_eos=True
        )
        core.add(Submit(index, prompt, params))
    tokens: dict[int, list[int]] = {}
    while core.has_work:
        for output in core.step():
            tokens.setdefault(output.id, []).extend(output.token_ids)
    return tokens


def start_to_first_token(is_dry: bool, tell: Tell) -> Json:
    """An 8B checkpoint in the page cache: the import of the engine's libraries, and from there to
    a token."""
    from loadtests.gpu.checkpoint import roomy_folder, write_random

    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import service.engine.start"], check=True)
    found: Json = {"import_s": time.monotonic() - began}
    tell(found)
    shape = "stories15m" if is_dry else "llama-3.1-8b"
    with roomy_folder(2**20 if is_dry else 18 * 2**30) as folder:
        began = time.monotonic()
        write_random(shape, folder, "cpu" if is_dry else "cuda")
        found["write_s"] = time.monotonic() - began
        tell(found)
        began = time.monotonic()
        core, info = start_engine(
            EngineConfig(
                str(folder),
                device="cpu" if is_dry else "cuda",
                dtype="bfloat16",
                max_model_len=64 if is_dry else 4096,
                deterministic=False,
            )
        )
        core.add(Submit(1, [1, 2, 3], SamplingParams(max_tokens=1, ignore_eos=True)))
        while core.has_work:
            core.step()
        found["engine_start_s"] = info.load_s
        found["capture_s"] = getattr(core.runner, "capture_s", None)
        found["first_token_s"] = found["import_s"] + time.monotonic() - began
        return found


def kernels_and_twins(is_dry: bool, tell: Tell) -> Json:
    """Logits of the kernels against those of their twins, on the device."""
    from loadtests.gpu.twins import compare

    return compare(torch.device("cpu" if is_dry else "cuda"), tell)


def transformers_batching(is_dry: bool, _: Tell) -> Json:
    """transformers' continuous batching on the work that `COMPARED` measures of ours."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    transformers.logging.set_verbosity_error()
    (case,) = COMPARED
    case = tiny(case) if is_dry else case
    fields = {k: v for k, v in PUBLISHED[case.shape].items() if k != "model_type"}
    config = AutoConfig.for_model(str(PUBLISHED[case.shape]["model_type"]), **fields)
    with torch.device("cpu" if is_dry else "cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    vocab_size = int(str(fields["vocab_size"]))
    prompts = [a.request.prompt_token_ids for a in requests_of(case, vocab_size, 0)]
    generation = GenerationConfig(
        do_sample=False, max_new_tokens=case.output_len[1], eos_token_id=-1, pad_token_id=0
    )
    options: Json = {"progress_bar": False}
    with suppress(ImportError):  # of earlier releases; they choose by themselves
        from transformers import ContinuousBatchingConfig

        # As transformers chooses on a GPU; on a CPU it must be told how much memory to take.
        sizes: Json = {
            "num_blocks": 64,
            "max_batch_tokens": 64,
            "max_memory_percent": 0.5,
            "use_cuda_graph": False,
        }
        options["continuous_batching_config"] = ContinuousBatchingConfig(
            allow_block_sharing=False, **(sizes if is_dry else {})
        )
    began = time.perf_counter()
    outputs = model.generate_batch(prompts, generation_config=generation, **options)
    elapsed_s = time.perf_counter() - began
    tokens = sum(len(answer.generated_tokens) for answer in outputs.values())
    return {"tokens_per_s": tokens / elapsed_s, "tokens": tokens}


SECTIONS: dict[str, Callable[[bool, Tell], Json]] = {
    "kernels": kernels_and_twins,
    "idle share": idle_share,
    "greedy tokens": greedy_equal,
    "start": start_to_first_token,
    "transformers": transformers_batching,
}
MEASURED = {case.name: case for case in CASES + COMPARED + DETERMINISTIC}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu.sections", description=__doc__)
    parser.add_argument("name", choices=[*MEASURED, *SECTIONS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit-s", type=float, default=600.0)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()

    def tell(found: Json) -> None:
        draft = given.out.with_suffix(".part")
        draft.write_text(json.dumps(found))
        draft.replace(given.out)

    if (case := MEASURED.get(given.name)) is not None:
        case = replace(tiny(case) if given.dry_run else case, limit_s=given.limit_s)
        tell(measure_case(case, given.dry_run, tell))
    else:
        tell(SECTIONS[given.name](given.dry_run, tell))


if __name__ == "__main__":
    main()
