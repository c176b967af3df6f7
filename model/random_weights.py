"""A model of random weights: what a step costs does not depend on what they say."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from model.parallel import Group, empty_part
from model.transformer import Transformer

STD = 0.02


def random_model(
    config: ModelConfig,
    max_positions: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    group: Group | None = None,
) -> Transformer:
    """Weights drawn from N(0, 0.02^2), norms of one, biases of zero; no second copy of any. With a
    `group`, this process's part of such a model, of other numbers than the whole one has."""
    if group is not None:
        model = empty_part(config, group, max_positions)
    else:
        with torch.device("meta"):
            model = Transformer(config, max_positions=max_positions)
    model.to(dtype).to_empty(device=device)
    if config.tie_embeddings and group is None:
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
