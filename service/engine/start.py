"""From an EngineConfig to an engine that can take requests: load, size the cache, check."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.checkpoint import load_checkpoint
from model.checkpoint_files import read_checkpoint_info
from model.config import ModelConfig
from model.cpu import RowPadding
from model.kv_cache import KVCache
from model.select import Selection
from model.transformer import Transformer
from service.engine import parallel
from service.engine.blocks import BlockPool
from service.engine.cache_size import WEIGHTS as WEIGHTS
from service.engine.cache_size import StartError as StartError
from service.engine.cache_size import cache_and_forward
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

if TYPE_CHECKING:
    from service.engine.ranks import Ranks

log = logging.getLogger("vitrine.engine")

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.bfloat16,  # of everything but the weights of products
    "float8": torch.bfloat16,
}


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


def prepare(config: EngineConfig, trained_len: int, rank: int = 0) -> tuple[torch.device, int]:
    """What is settled before there are weights: compute threads, the device, and the context
    length in tokens. Raises `StartError`."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    if config.tensor_parallel_size > 1:
        device = parallel.choose_device(config, device, rank)
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
    whole = read_checkpoint_info(directory).config
    device, max_model_len = prepare(config, whole.max_positions)
    ranks = parallel.start_ranks(config, whole)  # they load their parts at the same time
    checkpoint = load_checkpoint(
        directory,
        device=device,
        dtype=choose_dtype(config.dtype, device),
        max_positions=max_model_len,
        progress=progress,
        after_tensor=heartbeat,
        group=None if ranks is None else ranks.group,
    )
    core, info = assemble(
        checkpoint.model,
        checkpoint.eos_token_ids,
        config,
        began=began,
        heartbeat=heartbeat,
        ranks=ranks,
        whole=whole,
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
    ranks: Ranks | None = None,
    whole: ModelConfig | None = None,
) -> tuple[EngineCore, ModelInfo]:
    """The engine around a model that is on its device: kernels, padding, KV cache, books. With
    `ranks`, `model` is the first part of one whose numbers are `whole`.

    `began` is when loading did, in seconds of `time.monotonic()`. Raises `StartError`.
    """
    device, max_model_len = model.embedding.weight.device, model.max_positions
    config_of_all = whole or model.config
    all_parts = model if ranks is None else parallel.without_memory(config_of_all)
    num_parameters = sum(p.numel() for p in all_parts.parameters())
    dtype = model.embedding.weight.dtype
    # Of plain weights: the forward packs them.
    traffic = traffic_of_model(all_parts, dtype, int8=config.dtype in WEIGHTS)
    limits = Limits(config.max_num_seqs, config.max_batched_tokens, max_model_len)
    if ranks is not None:
        parallel.meet(ranks, device, heartbeat)
    cache, selection = cache_and_forward(
        model, config, limits, None if ranks is None else ranks.group
    )
    for miss in selection.misses:
        log.warning("%s", miss)
    runner = _make_runner(selection, cache, model.config, limits, eos_token_ids, heartbeat, ranks)
    core = EngineCore(
        Scheduler(limits, BlockPool(cache.num_blocks, config.block_size)),
        runner,
        overlap=config.overlap and not isinstance(runner, Runner),
        pace=PromptPace(config.max_step_ratio),
        explain=None if ranks is not None else partial(explain, model, eos_token_ids),
        traffic=traffic,
    )
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    info = ModelInfo(
        family=config_of_all.family,
        num_parameters=num_parameters,
        dtype=config.dtype if config.dtype in WEIGHTS else str(dtype).removeprefix("torch."),
        device=str(device),
        vocab_size=config_of_all.vocab_size,
        num_layers=config_of_all.num_layers,
        num_heads=config_of_all.num_heads,
        num_kv_heads=config_of_all.num_kv_heads,
        head_dim=config_of_all.head_dim,
        hidden_size=config_of_all.hidden_size,
        context_length=max_model_len,
        eos_token_ids=list(eos_token_ids),
        block_size=config.block_size,
        num_blocks=cache.num_blocks,
        kv_cache_bytes=config.tensor_parallel_size * (cache.keys.nbytes + cache.values.nbytes),
        weight_bytes=config.tensor_parallel_size * selection.weight_bytes,
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
        can_explain=core.explain is not None,
        tensor_parallel_size=config.tensor_parallel_size,
    )
    return core, info


def _make_runner(
    selection: Selection,
    cache: KVCache,
    model: ModelConfig,
    limits: Limits,
    eos_token_ids: tuple[int, ...],
    heartbeat: Heartbeat | None,
    ranks: Ranks | None,
) -> StepRunner:
    """A GPU's, when Triton's kernels serve; else the plain one."""
    if selection.name == "cuda" or ranks is not None:
        from model.fused import FusedForward
        from service.engine.device.runner import DeviceRunner
        from service.engine.device.steps import BUCKETS

        if isinstance(selection.forward, FusedForward):
            return DeviceRunner(
                selection.forward,
                limits,
                eos_token_ids=eos_token_ids,
                buckets=BUCKETS if ranks is None else parallel.BUCKETS,
                heartbeat=heartbeat,
                others=ranks,
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
