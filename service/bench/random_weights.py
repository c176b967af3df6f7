"""An engine around a model of a published shape and random weights: what a step costs does
not depend on what the weights say."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from model.config import ModelConfig
from model.random_weights import random_model as random_model
from service.engine.core import EngineCore
from service.engine.messages import EngineConfig, ModelInfo
from service.engine.parallel import start_ranks
from service.engine.rank_messages import RandomWeights
from service.engine.start import assemble, choose_dtype, prepare


def start_random_engine(
    shape: ModelConfig, config: EngineConfig, *, needed_len: int, seed: int
) -> tuple[EngineCore, ModelInfo]:
    """`service.engine.start.start_engine` without a checkpoint.

    A shape whose context is shorter than `needed_len` tokens is given one as long as that:
    random weights were not trained for any. Raises `StartError`.
    """
    began = time.monotonic()
    whole = replace(shape, max_positions=max(shape.max_positions, needed_len))
    device, max_model_len = prepare(config, whole.max_positions)
    ranks = start_ranks(config, whole, RandomWeights(whole, seed))
    group = None if ranks is None else ranks.group
    dtype = choose_dtype(config.dtype, device) or torch.bfloat16
    model = random_model(whole, max_model_len, device, dtype, seed, group)
    return assemble(model, (), config, began=began, ranks=ranks, whole=whole)
