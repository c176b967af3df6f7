"""The kernels against their twins on the device that is here: the first thing to know about a new
GPU, and it needs no test library."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.backends.cuda import CudaBackend
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.families import read_config
from model.families.published import PUBLISHED
from model.fused import FusedForward
from model.kernels.gpu.draw import DrawRows
from model.kernels.gpu.kernels import TRITON, TWINS, Kernels
from model.kv_cache import KVCache
from model.noise import seed_words
from model.products import fixed_product, library_product
from model.random_weights import random_model

Json = dict[str, Any]

SHAPES = ("qwen3-0.6b", "llama-3.1-8b", "mistral-7b", "gpt2")
TINY = "stories15m"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LENGTHS = (300, 17, 1, 130)  # tokens of prompts
BLOCK_SIZE = 32
MAX_MODEL_LEN = 1024
# Of the largest logit: what rounding in these dtypes may leave after two layers.
BOUNDS = {"bfloat16": 0.05, "float16": 0.01, "float32": 1e-3}


def compare(device: torch.device, tell: Callable[[Json], None]) -> Json:
    """For each shape, dtype and mode, the largest difference of any logit, of prompts in chunks and
    of single tokens after them, as a share of the largest logit; and whether draws are equal."""
    kernels = TRITON if device.type == "cuda" else TWINS  # else it would be the interpreter
    shapes = SHAPES if device.type == "cuda" else (TINY,)
    found: Json = {"largest": 0.0, "within": True, "settings": {}}
    for shape, dtype, deterministic in itertools.product(shapes, DTYPES, (False, True)):
        config = replace(read_config(PUBLISHED[shape]), num_layers=2, max_positions=MAX_MODEL_LEN)
        windows = config.sliding_windows and (100, None)
        config = replace(config, sliding_windows=windows)
        model = random_model(config, MAX_MODEL_LEN, device, DTYPES[dtype], 0)
        ours, theirs = (
            _logits(model, config, device, one, deterministic=deterministic)
            for one in (kernels, TWINS)
        )
        differences = [
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
        ]
        worst = max(differences) if all(d == d for d in differences) else float("inf")
        name = f"{shape} {dtype}{' deterministic' if deterministic else ''}"
        found["settings"][name] = {"largest": worst, "same_draws": _same_draws(theirs[0], kernels)}
        found["largest"] = max(found["largest"], worst / BOUNDS[dtype])
        found["within"] = all(
            one["largest"] <= BOUNDS[which.split()[1]] and one["same_draws"]
            for which, one in found["settings"].items()
        )
        tell(found)
    return found


@torch.inference_mode()
def _logits(
    model: torch.nn.Module,
    config: ModelConfig,
    device: torch.device,
    kernels: Kernels,
    *,
    deterministic: bool,
) -> list[Tensor]:
    """Of prompts, of their second chunks, and of a token after each."""
    per_seq = -(-MAX_MODEL_LEN // BLOCK_SIZE)
    cache = KVCache.allocate(
        config,
        num_blocks=per_seq * len(LENGTHS),
        block_size=BLOCK_SIZE,
        dtype=model.embedding.weight.dtype,
        device=device,
        by_token=True,
    )
    backend = CudaBackend(config, cache, MAX_MODEL_LEN, deterministic, kernels)
    make_product = fixed_product(kernels) if deterministic else library_product
    forward = FusedForward(model, backend, make_product=make_product)
    rng = random.Random(5)
    blocks = list(range(cache.num_blocks))
    rng.shuffle(blocks)
    tables = torch.tensor(blocks, dtype=torch.int32, device=device).view(len(LENGTHS), per_seq)
    done, logits = [0] * len(LENGTHS), []
    for counts in (LENGTHS, (40, 3, 70, 1), (1,) * len(LENGTHS)):
        logits.append(forward(_batch(config, tables, done, counts, rng)).float().clone())
        done = [before + count for before, count in zip(done, counts, strict=True)]
    return logits


def _batch(
    config: ModelConfig,
    tables: Tensor,
    done: list[int],
    counts: tuple[int, ...],
    rng: random.Random,
) -> ForwardBatch:
    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=tables.device)

    # Single tokens first, as the engine has them.
    order = sorted(range(len(counts)), key=lambda seq: counts[seq] > 1)
    rows = tables[ints(order).long()]
    starts = list(itertools.accumulate((counts[seq] for seq in order), initial=0))
    positions = [p for seq in order for p in range(done[seq], done[seq] + counts[seq])]
    host = rows.tolist()
    slots = [
        host[row][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
        for row, seq in enumerate(order)
        for p in range(done[seq], done[seq] + counts[seq])
    ]
    contexts = [done[seq] + counts[seq] for seq in order]
    return ForwardBatch(
        input_ids=ints([rng.randrange(config.vocab_size) for _ in positions]),
        positions=ints(positions),
        query_start=ints(starts),
        context_lens=ints(contexts),
        block_tables=rows,
        slot_mapping=ints(slots),
        logits_rows=ints([start - 1 for start in starts[1:]]),
        query_start_host=tuple(starts),
        context_lens_host=tuple(contexts),
    )


def _same_draws(logits: Tensor, kernels: Kernels) -> bool:
    """Greedy, with top-k, with top-p and min-p, and with nothing."""
    device, num_rows = logits.device, logits.shape[0]

    def floats(*values: float) -> Tensor:
        return torch.tensor(values, device=device)

    words = [seed_words(seed) for seed in range(num_rows)]
    rows = DrawRows(
        inverse_temperature=floats(0.0, 1.2, 1.0, 1.0),
        top_k=torch.tensor([0, 40, 0, 0], dtype=torch.int32, device=device),
        top_p=floats(1.0, 1.0, 0.8, 1.0),
        min_p=floats(-3e38, -3e38, -4.0, -3e38),
        seeds=torch.tensor(words, dtype=torch.int32, device=device).t().contiguous(),
        positions=torch.arange(num_rows, dtype=torch.int32, device=device),
        seats=torch.arange(num_rows, dtype=torch.int32, device=device),
    )
    seats = torch.zeros(num_rows, dtype=torch.int32, device=device)
    drawn = [one.draw(logits.clone(), rows, seats)[0] for one in (kernels, TWINS)]
    return bool((drawn[0] == drawn[1]).all())
