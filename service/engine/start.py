"""From an EngineConfig to an engine that can take requests: load, size the cache, check."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import torch

from model.checkpoint import load_checkpoint
from model.checkpoint_files import read_checkpoint_info
from model.config import ModelConfig
from model.cpu import RowPadding
from model.kv_cache import KVCache, bytes_per_block
from model.select import Selection, Weights, WeightsUnavailableError, select_forward
from model.transformer import Transformer
from service.engine.blocks import BlockPool
from service.engine.core import EngineCore
from service.engine.explaining import explain
from service.engine.grammars import GrammarQueue
from service.engine.heartbeat import Heartbeat
from service.engine.messages import EngineConfig, ModelInfo
from service.engine.pace import PromptPace
from service.engine.runner import Runner, StepRunner
from service.engine.scheduler import Limits, Scheduler
from service.engine.traffic import traffic_of_model
from service.grammars import are_installed

log = logging.getLogger("vitrine.engine")

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.bfloat16,  # of everything but the weights of products
    "float8": torch.bfloat16,
}
WEIGHTS: dict[str, Weights] = {"int8": "int8", "float8": "float8"}  # of products
# Without an instruction the cache holds this many full-length sequences, or this many
# bytes, whichever is less.
DEFAULT_CACHE_SEQUENCES = 64
DEFAULT_CACHE_BYTES = 2 * 2**30


class StartError(Exception):
    """The engine cannot start as configured; the message is for the operator."""


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises `StartError` for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartError(f"device {name!r} is not one torch knows") from error
    if device.type not in ("cpu", "cuda"):
        raise StartError(f"device {name!r} is not supported; cpu and cuda are")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise StartError(f"device {name!r} was asked for; torch sees {torch.cuda.device_count()}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """`auto` is float32 on a CPU and the checkpoint's own on a GPU (None)."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else None
    if name not in DTYPES:
        raise StartError(f"dtype {name!r} is not supported; auto, {', '.join(DTYPES)} are")
    return DTYPES[name]


def prepare(config: EngineConfig, trained_len: int) -> tuple[torch.device, int]:
    """What is settled before there are weights: compute threads, the device, and the context
    length in tokens. Raises `StartError`."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    max_model_len = config.max_model_len or trained_len
    if max_model_len > trained_len:
        raise StartError(
            f"max-model-len {max_model_len} was asked for; the model was made for {trained_len}"
        )
    return device, max_model_len


def start_engine(
    config: EngineConfig, *, progress: bool = False, heartbeat: Heartbeat | None = None
) -> tuple[EngineCore, ModelInfo]:
    """Load the checkpoint and allocate the KV cache. `heartbeat` is called between tensors,
    and later between the layers of a step.

    Raises `StartError` or `model.checkpoint.CheckpointError` with words for the operator.
    """
    began = time.monotonic()
    directory = Path(config.model_dir)
    device, max_model_len = prepare(config, read_checkpoint_info(directory).config.max_positions)
    checkpoint = load_checkpoint(
        directory,
        device=device,
        dtype=choose_dtype(config.dtype, device),
        max_positions=max_model_len,
        progress=progress,
        after_tensor=heartbeat,
    )
    core, info = assemble(
        checkpoint.model, checkpoint.eos_token_ids, config, began=began, heartbeat=heartbeat
    )
    if are_installed():
        core.grammars = GrammarQueue(directory, info.vocab_size, checkpoint.eos_token_ids)
    return core, info


def assemble(
    model: Transformer,
    eos_token_ids: tuple[int, ...],
    config: EngineConfig,
    *,
    began: float,
    heartbeat: Heartbeat | None = None,
) -> tuple[EngineCore, ModelInfo]:
    """The engine around a model that is on its device: kernels, padding, KV cache, books.

    `began` is when loading did, in seconds of `time.monotonic()`. Raises `StartError`.
    """
    device, max_model_len = model.embedding.weight.device, model.max_positions
    num_parameters = sum(p.numel() for p in model.parameters())
    dtype = model.embedding.weight.dtype
    # Of plain weights: the forward packs them.
    traffic = traffic_of_model(model, dtype, int8=config.dtype in WEIGHTS)
    limits = Limits(config.max_num_seqs, config.max_batched_tokens, max_model_len)
    cache, selection = _cache_and_forward(model, config, limits)
    for miss in selection.misses:
        log.warning("%s", miss)
    runner = _make_runner(selection, cache, model.config, limits, eos_token_ids, heartbeat)
    core = EngineCore(
        Scheduler(limits, BlockPool(cache.num_blocks, config.block_size)),
        runner,
        overlap=config.overlap and not isinstance(runner, Runner),
        pace=PromptPace(config.max_step_ratio),
        explain=partial(explain, model, eos_token_ids),
        traffic=traffic,
    )
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    info = ModelInfo(
        family=model.config.family,
        num_parameters=num_parameters,
        dtype=config.dtype if config.dtype in WEIGHTS else str(dtype).removeprefix("torch."),
        device=str(device),
        vocab_size=model.config.vocab_size,
        num_layers=model.config.num_layers,
        num_heads=model.config.num_heads,
        num_kv_heads=model.config.num_kv_heads,
        head_dim=model.config.head_dim,
        hidden_size=model.config.hidden_size,
        context_length=max_model_len,
        eos_token_ids=list(eos_token_ids),
        block_size=config.block_size,
        num_blocks=cache.num_blocks,
        kv_cache_bytes=cache.keys.nbytes + cache.values.nbytes,
        weight_bytes=selection.weight_bytes,
        load_s=time.monotonic() - began,
        torch_version=str(torch.__version__),
        threads=torch.get_num_threads(),
        deterministic=config.deterministic and selection.padding is not None,
        attention_backend=selection.name,
        row_padding=(
            None
            if selection.padding is None
            else (selection.padding.minimum, selection.padding.multiple)
        ),
        device_name="" if gpu is None else gpu.name,
        device_uuid=None if gpu is None else str(gpu.uuid),
        can_watch=runner.can_watch,
    )
    return core, info


def _select(model: Transformer, cache: KVCache, config: EngineConfig) -> Selection:
    try:
        return select_forward(
            model,
            cache,
            deterministic=config.deterministic,
            weights=WEIGHTS.get(config.dtype, "plain"),
            padding=None if config.row_padding is None else RowPadding(*config.row_padding),
        )
    except WeightsUnavailableError as error:
        raise StartError(f"dtype {config.dtype} cannot be served here: {error}") from error


def _make_runner(
    selection: Selection,
    cache: KVCache,
    model: ModelConfig,
    limits: Limits,
    eos_token_ids: tuple[int, ...],
    heartbeat: Heartbeat | None,
) -> StepRunner:
    """A GPU's, when Triton's kernels serve; else the plain one."""
    if selection.name == "cuda":
        from model.fused import FusedForward
        from service.engine.device.runner import DeviceRunner

        if isinstance(selection.forward, FusedForward):
            return DeviceRunner(
                selection.forward, limits, eos_token_ids=eos_token_ids, heartbeat=heartbeat
            )
    return Runner(
        selection.forward,
        cache,
        model,
        eos_token_ids,
        cache.keys.device,
        padding=selection.padding or RowPadding(),
        heartbeat=heartbeat,
    )


def _cache_and_forward(
    model: Transformer, config: EngineConfig, limits: Limits
) -> tuple[KVCache, Selection]:
    """The KV cache and what runs over it. On a GPU that is asked for no size, the largest step
    runs first, over a cache of one block, and shows what it leaves. Raises `StartError`."""
    dtype, device = model.embedding.weight.dtype, model.embedding.weight.device

    def allocate(num_blocks: int) -> KVCache:
        return KVCache.allocate(
            model.config,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=dtype,
            device=device,
        )

    if device.type == "cpu" or config.kv_cache_bytes is not None:
        cache = allocate(_num_blocks(config, model.config, dtype, limits.max_model_len))
        return cache, _select(model, cache, config)
    selection = _select(model, allocate(1), config)
    if selection.name != "cuda":
        cache = allocate(_num_blocks(config, model.config, dtype, limits.max_model_len))
        return cache, _select(model, cache, config)
    from model.fused import FusedForward
    from model.kernels.gpu.kernels import TRITON
    from service.engine.device.memory import OutOfMemoryError, measure

    if not isinstance(selection.forward, FusedForward):
        raise TypeError(f"a GPU forward of {type(selection.forward).__name__}")
    least = -(-limits.max_model_len // config.block_size)
    per_block = bytes_per_block(model.config, config.block_size, dtype)
    try:
        memory = measure(selection.forward, TRITON, limits, model.config.vocab_size, device)
        cache = allocate(memory.num_blocks(config.gpu_memory_utilization, per_block, least))
    except (OutOfMemoryError, torch.cuda.OutOfMemoryError) as error:
        raise StartError(str(error).partition("\n")[0]) from error
    selection.forward.use_cache(cache)
    return cache, selection


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
