"""What is settled before the parts of a model are loaded, and the other ranks' way to theirs.

What is refused here is refused by rank 0 before a rank is started.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.checkpoint import load_checkpoint
from model.checkpoint_files import read_checkpoint_info
from model.config import ModelConfig
from model.parallel import Group, part_config
from model.random_weights import random_model
from model.transformer import Transformer
from service.engine.cache_size import WEIGHTS, StartError, cache_and_forward
from service.engine.messages import EngineConfig
from service.engine.rank_messages import Lead, RandomWeights
from service.engine.scheduler import Limits

if TYPE_CHECKING:
    from service.engine.device.steps import DeviceSteps
    from service.engine.ranks import Ranks

# Sums over GPUs inside a CUDA graph have never been run here: steps are launched kernel by kernel.
BUCKETS: tuple[int, ...] = ()


def choose_device(config: EngineConfig, device: torch.device, rank: int) -> torch.device:
    """The device of a rank: the GPU of its number, or the CPU, whose threads are shared out.
    Raises `StartError`."""
    size = config.tensor_parallel_size
    if device.type == "cpu":
        if config.threads is None:
            torch.set_num_threads(max(1, torch.get_num_threads() // size))
        return device
    if device.index is not None:
        raise StartError(
            f"device {config.device!r} is one GPU; tensor-parallel-size {size} takes cuda:0 to "
            f"cuda:{size - 1}"
        )
    if size > torch.cuda.device_count():
        raise StartError(
            f"tensor-parallel-size {size} was asked for; torch sees {torch.cuda.device_count()} "
            "GPUs"
        )
    own = torch.device("cuda", rank)
    torch.cuda.set_device(own)
    return own


def start_ranks(
    config: EngineConfig, whole: ModelConfig, random: RandomWeights | None = None
) -> Ranks | None:
    """The other ranks' processes, which begin to load; None where there is one part only. Raises
    `StartError`, and `ConfigError` for a model that cannot be cut."""
    size = config.tensor_parallel_size
    if size == 1:
        return None
    if config.dtype in WEIGHTS:
        raise StartError(f"dtype {config.dtype} is not for tensor-parallel-size {size}, only for 1")
    part_config(whole, size)
    try:
        from service.engine.ranks import Ranks
    except ImportError as error:
        raise StartError(f"tensor-parallel-size {size} needs triton: {error}") from error
    return Ranks(config, random)


def meet(ranks: Ranks, device: torch.device, heartbeat: Callable[[], None] | None = None) -> None:
    """Wait for the other ranks. Raises `StartError`."""
    from service.engine.ranks import RankFailedError

    try:
        ranks.meet(device, heartbeat)
    except RankFailedError as error:
        raise StartError(str(error)) from error


def without_memory(config: ModelConfig) -> Transformer:
    """The whole model, to be counted."""
    with torch.device("meta"):
        return Transformer(config, max_positions=1)


def load_rank(lead: Lead) -> tuple[Transformer, torch.device]:
    """The part of a rank, on its device. Raises what `start_engine` does."""
    from service.engine.start import choose_dtype, prepare

    config, group = lead.config, Group(lead.rank, lead.config.tensor_parallel_size)
    if lead.random is not None:
        whole = lead.random.model
        device, max_model_len = prepare(config, whole.max_positions, lead.rank)
        dtype = choose_dtype(config.dtype, device) or torch.bfloat16
        return random_model(whole, max_model_len, device, dtype, lead.random.seed, group), device
    directory = Path(config.model_dir)
    whole = read_checkpoint_info(directory).config
    device, max_model_len = prepare(config, whole.max_positions, lead.rank)
    checkpoint = load_checkpoint(
        directory,
        device=device,
        dtype=choose_dtype(config.dtype, device),
        max_positions=max_model_len,
        group=group,
    )
    return checkpoint.model, device


def make_steps(lead: Lead, model: Transformer, device: torch.device) -> DeviceSteps:
    """Join the others, and size the cache with them."""
    from model.fused import FusedForward
    from service.engine.device.steps import DeviceSteps
    from service.engine.ranks import join

    config, group = lead.config, Group(lead.rank, lead.config.tensor_parallel_size)
    join(group, Path(lead.folder), device)
    limits = Limits(config.max_num_seqs, config.max_batched_tokens, model.max_positions)
    _, selection = cache_and_forward(model, config, limits, group)
    if not isinstance(selection.forward, FusedForward):
        raise TypeError(f"a part of {type(selection.forward).__name__}")
    return DeviceSteps(selection.forward, limits, buckets=BUCKETS)
