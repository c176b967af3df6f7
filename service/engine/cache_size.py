"""The KV cache, and what runs over it: how large it is, on one device or on each of several."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from model.config import ModelConfig
from model.cpu import RowPadding
from model.exchange import ApartError
from model.kv_cache import KVCache, bytes_per_block
from model.parallel import Group
from model.select import (
    Selection,
    Weights,
    WeightsUnavailableError,
    select_forward,
    select_part,
)
from model.transformer import Transformer
from service.engine.messages import EngineConfig
from service.engine.scheduler import Limits

if TYPE_CHECKING:
    from model.fused import FusedForward

log = logging.getLogger("vitrine.engine")

WEIGHTS: dict[str, Weights] = {"int8": "int8", "float8": "float8"}  # of products
# Without an instruction the cache holds this many full-length sequences, or this many
# bytes, whichever is less.
DEFAULT_CACHE_SEQUENCES = 64
DEFAULT_CACHE_BYTES = 2 * 2**30


class StartError(Exception):
    """The engine cannot start as configured; the message is for the operator."""


def cache_and_forward(
    model: Transformer, config: EngineConfig, limits: Limits, group: Group | None = None
) -> tuple[KVCache, Selection]:
    """The KV cache and what runs over it. On a GPU that is asked for no size, the largest step
    runs first, over a cache of one block, and shows what it leaves. With a `group`, `model` is a
    part, all of whose processes call this at the same time and get as many blocks. Raises
    `StartError`."""
    dtype, device = model.embedding.weight.dtype, model.embedding.weight.device

    def allocate(num_blocks: int) -> KVCache:
        return KVCache.allocate(
            model.config,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=dtype,
            device=device,
        )

    def of_fixed_size() -> tuple[KVCache, Selection]:
        cache = allocate(_num_blocks(config, model.config, dtype, limits.max_model_len))
        return cache, _select(model, cache, config, group)

    if device.type == "cpu" or config.kv_cache_bytes is not None:
        return of_fixed_size()
    selection = _select(model, allocate(1), config, group)
    if selection.name != "cuda":
        return of_fixed_size()
    from model.fused import FusedForward

    if not isinstance(selection.forward, FusedForward):
        raise TypeError(f"a GPU forward of {type(selection.forward).__name__}")
    num_blocks = _measured_blocks(selection.forward, model, config, limits, group)
    try:
        cache = allocate(num_blocks)
    except torch.OutOfMemoryError as error:
        raise StartError(str(error).partition("\n")[0]) from error
    selection.forward.use_cache(cache)
    return cache, selection


def _measured_blocks(
    forward: FusedForward,
    model: Transformer,
    config: EngineConfig,
    limits: Limits,
    group: Group | None,
) -> int:
    from model.kernels.gpu.kernels import TRITON
    from service.engine.device.memory import OutOfMemoryError, measure

    weight = model.embedding.weight
    least = -(-limits.max_model_len // config.block_size)
    per_block = bytes_per_block(model.config, config.block_size, weight.dtype)
    num_blocks, problem = 0, ""
    try:
        forward.reserve(
            num_seats=1, num_rows=limits.max_num_seqs, num_tokens=limits.max_batched_tokens
        )
    except torch.OutOfMemoryError as error:
        raise StartError(str(error).partition("\n")[0]) from error
    try:
        memory = measure(forward, TRITON, limits, model.config.vocab_size, weight.device)
        num_blocks = memory.num_blocks(config.gpu_memory_utilization, per_block, least)
    except ApartError as error:
        raise StartError(f"the parts of the model have lost each other: {error}") from error
    except OutOfMemoryError as error:
        problem = str(error)
        log.error("%s: %s", weight.device, problem)
    if group is not None:  # who has no room must say so, or the others would wait for its sums
        num_blocks = group.least(num_blocks, weight.device)
    if not num_blocks:
        raise StartError(problem or "the KV cache does not fit another GPU; its log line says why")
    return num_blocks


def _select(
    model: Transformer, cache: KVCache, config: EngineConfig, group: Group | None
) -> Selection:
    try:
        if group is not None:
            return select_part(model, cache, group, deterministic=config.deterministic)
        return select_forward(
            model,
            cache,
            deterministic=config.deterministic,
            weights=WEIGHTS.get(config.dtype, "plain"),
            padding=None if config.row_padding is None else RowPadding(*config.row_padding),
        )
    except WeightsUnavailableError as error:
        raise StartError(f"dtype {config.dtype} cannot be served here: {error}") from error


def _num_blocks(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, max_model_len: int
) -> int:
    per_block = bytes_per_block(model, config.block_size, dtype)
    blocks_per_sequence = -(-max_model_len // config.block_size)
    if config.kv_cache_bytes is None:
        fitting = max(DEFAULT_CACHE_BYTES // per_block, blocks_per_sequence)
        return min(DEFAULT_CACHE_SEQUENCES * blocks_per_sequence, fitting)
    num_blocks = config.kv_cache_bytes // per_block
    if num_blocks < 1:
        raise StartError(
            f"a KV cache of {config.kv_cache_bytes:,} bytes does not hold one block of "
            f"{config.block_size} tokens, which takes {per_block:,}"
        )
    return num_blocks
