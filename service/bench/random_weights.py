"""An engine around a model of a published shape and random weights: what a step costs does
not depend on what the weights say."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from model.config import ModelConfig
from model.transformer import Transformer
from service.engine.core import EngineCore
from service.engine.messages import EngineConfig, ModelInfo
from service.engine.start import assemble, choose_dtype, prepare

STD = 0.02


def start_random_engine(
    shape: ModelConfig, config: EngineConfig, *, needed_len: int, seed: int
) -> tuple[EngineCore, ModelInfo]:
    """`service.engine.start.start_engine` without a checkpoint.

    A shape whose context is shorter than `needed_len` tokens is given one as long as that:
    random weights were not trained for any. Raises `StartError`.
    """
    began = time.monotonic()
    shape = replace(shape, max_positions=max(shape.max_positions, needed_len))
    device, max_model_len = prepare(config, shape.max_positions)
    dtype = choose_dtype(config.dtype, device) or torch.bfloat16
    model = random_model(shape, max_model_len, device, dtype, seed)
    return assemble(model, (), config, began=began)


def random_model(
    config: ModelConfig,
    max_positions: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Transformer:
    """Weights drawn from N(0, 0.02^2), norms of one, biases of zero; no second copy of any."""
    with torch.device("meta"):
        model = Transformer(config, max_positions=max_positions)
    model.to(dtype).to_empty(device=device)
    if config.tie_embeddings:
        model.lm_head.weight = model.embedding.weight
    model.place_position_tables(device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=STD, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)
