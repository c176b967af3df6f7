"""Small engines on random weights, for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from model.backends.cpu import CpuBackend
from model.backends.cuda import CudaBackend
from model.config import ModelConfig
from model.cpu import RowPadding, choose_padding
from model.forward import EagerForward, Forward
from model.fused import FusedForward
from model.kernels.gpu.kernels import TWINS, Kernels
from model.kv_cache import KVCache
from model.products import fixed_product, library_product
from model.sampling_params import SamplingParams
from model.transformer import Transformer
from service.engine.blocks import BlockPool
from service.engine.core import EngineCore
from service.engine.device.runner import DeviceRunner
from service.engine.messages import SequenceOutput, Submit
from service.engine.runner import Runner
from service.engine.scheduler import Limits, Scheduler

VOCAB_SIZE = 211
EOS = 0

TINY = ModelConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=20,  # not hidden_size / num_heads
    intermediate_size=80,
    max_positions=256,
    sliding_windows=(None, 40, None),
)


# What compiled code takes: sizes of multiples of 16.
TINY_COMPILED = replace(TINY, num_heads=3, num_kv_heads=1, head_dim=16, qk_norm=True)

# LayerNorm, GELU, biases and learned positions take other code than the above.
TINY_GPT2 = ModelConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=48,
    num_layers=2,
    num_heads=3,
    num_kv_heads=3,
    head_dim=16,
    intermediate_size=192,
    max_positions=256,
    norm="layernorm",
    mlp="gelu_tanh",
    position="learned",
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
)


def random_model(config: ModelConfig = TINY, seed: int = 0) -> Transformer:
    """Weights large enough that the next token depends on the whole context."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.3, generator=generator)
    return model


def eager_forward(model: Transformer, cache: KVCache) -> EagerForward:
    """The PyTorch twin of what serves."""
    return EagerForward(model, CpuBackend(model.config, cache))


def make_device_core(
    model: Transformer,
    *,
    num_blocks: int = 64,
    block_size: int = 8,
    max_num_seqs: int = 16,
    max_batched_tokens: int = 64,
    overlap: bool = False,
    buckets: tuple[int, ...] = (1, 2, 4, 8, 16),
    kernels: Kernels = TWINS,
    is_deterministic: bool = False,
) -> EngineCore:
    """The engine of a GPU, on a GPU or wherever `model` lies: the same code, with the kernels'
    twins unless told otherwise, and with steps done instead of captured."""
    config, weight = model.config, model.embedding.weight
    cache = KVCache.allocate(
        config,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=weight.dtype,
        device=weight.device,
        by_token=True,
    )
    limits = Limits(max_num_seqs, max_batched_tokens, config.max_positions)
    backend = CudaBackend(config, cache, config.max_positions, is_deterministic, kernels)
    make_product = fixed_product(kernels) if is_deterministic else library_product
    forward = FusedForward(model, backend, make_product=make_product)
    runner = DeviceRunner(forward, limits, eos_token_ids=(EOS,), buckets=buckets)
    scheduler = Scheduler(limits, BlockPool(num_blocks, block_size))
    return EngineCore(scheduler, runner, overlap=overlap)


def make_core(
    model: Transformer,
    *,
    num_blocks: int = 64,
    block_size: int = 8,
    max_num_seqs: int = 16,
    max_batched_tokens: int = 64,
    make_forward: Callable[[Transformer, KVCache], Forward] | None = None,
) -> EngineCore:
    """An engine around `model` with a cache of its own; in plain torch, its rows padded for
    deterministic mode, unless `make_forward` says otherwise."""
    config = model.config
    cache = KVCache.allocate(
        config,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=model.embedding.weight.dtype,
    )
    limits = Limits(max_num_seqs, max_batched_tokens, config.max_positions)
    return EngineCore(
        Scheduler(limits, BlockPool(num_blocks, block_size)),
        Runner(
            make_forward(model, cache) if make_forward else eager_forward(model, cache),
            cache,
            config,
            (EOS,),
            torch.device("cpu"),
            padding=RowPadding() if make_forward else choose_padding(model) or RowPadding(),
        ),
    )


@dataclass
class Result:
    """All that a sequence got."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    error: str | None = None


def collect(outputs: list[SequenceOutput], results: dict[int, Result]) -> None:
    """Add a step's outputs to what is already there."""
    for output in outputs:
        result = results.setdefault(output.id, Result([], [], ""))
        assert not result.finish_reason, "output after the end"
        result.token_ids += output.token_ids
        result.logprobs += [entry.logprob for entry in output.logprobs or []]
        result.finish_reason = output.finish_reason or ""
        result.error = output.error


def run_all(core: EngineCore, requests: list[Submit]) -> dict[int, Result]:
    """Add everything at once and step to the end."""
    results: dict[int, Result] = {}
    for request in requests:
        core.add(request)
    while core.has_work:
        collect(core.step(), results)
    core.scheduler.pool.check()
    assert core.scheduler.pool.num_referenced == 0
    return results


def submit(sequence_id: int, prompt: list[int], **sampling: object) -> Submit:
    """A request; log-probabilities are asked for, because their bits tell more than ids."""
    params = SamplingParams(**({"logprobs": 2} | sampling))  # type: ignore[arg-type]
    return Submit(sequence_id, prompt, params)
