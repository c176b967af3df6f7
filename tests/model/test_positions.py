"""Positions against their formulas, and scaled rotary frequencies against transformers'."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.config import ModelConfig, RopeScaling
from model.positions import (
    RotaryPositions,
    apply_rotary,
    rotary_frequencies,
    rotary_table,
    sinusoidal_table,
)


def make_config(
    head_dim: int = 64, theta: float = 10_000.0, scaling: RopeScaling | None = None
) -> ModelConfig:
    return ModelConfig(
        vocab_size=10,
        hidden_size=head_dim * 2,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=head_dim,
        intermediate_size=8,
        max_positions=256,
        rope_theta=theta,
        rope_scaling=scaling,
    )


# Sinusoidal.


@pytest.mark.parametrize("hidden_size", [2, 6, 64])
def test_sinusoids_are_those_of_the_formula(hidden_size: int) -> None:
    table = sinusoidal_table(300, hidden_size)
    for position in (0, 1, 2, 17, 299):
        for i in range(hidden_size // 2):
            angle = position / 10_000 ** (2 * i / hidden_size)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=5e-5)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=5e-5)


def test_known_sinusoids() -> None:
    """Position 1 in four dimensions: sin 1, cos 1, sin 1/100, cos 1/100."""
    first, second = sinusoidal_table(2, 4).tolist()
    assert first == [0.0, 1.0, 0.0, 1.0]
    assert second == pytest.approx([0.841471, 0.540302, 0.010000, 0.999950], abs=1e-6)


@pytest.mark.parametrize("shift", [1, 7, 100])
def test_a_shift_is_the_same_rotation_everywhere(shift: int) -> None:
    """Why sinusoids: each pair at p + k is the pair at p turned by an angle that depends on
    k alone (Vaswani et al. 2017, section 3.5)."""
    table = sinusoidal_table(300, 16)
    as_complex = torch.complex(table[:, 1::2], table[:, 0::2])  # cos + i sin
    turns = as_complex[shift : shift + 1]
    torch.testing.assert_close(
        as_complex[: 300 - shift] * turns, as_complex[shift:], atol=1e-4, rtol=0
    )


# Rotary.


def turn(vector: Tensor, position: int, config: ModelConfig) -> Tensor:
    cos, sin = rotary_table(config, position + 1)
    turned = apply_rotary(vector[None, None], cos[-1:, None].double(), sin[-1:, None].double())
    return turned[0, 0]


def random_vector(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    half=st.integers(1, 32),
    position=st.integers(0, 5_000),
    theta=st.sampled_from([100.0, 10_000.0, 500_000.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_a_rotation_keeps_the_length(half: int, position: int, theta: float, seed: int) -> None:
    vector = random_vector(2 * half, seed)
    turned = turn(vector, position, make_config(2 * half, theta))
    assert turned.norm().item() == pytest.approx(vector.norm().item(), rel=1e-6)


@given(
    query_at=st.integers(0, 1_000),
    distance=st.integers(0, 1_000),
    shift=st.integers(0, 1_000),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_a_score_depends_on_the_distance_alone(
    query_at: int, distance: int, shift: int, seed: int
) -> None:
    config = make_config(32)
    query, key = random_vector(32, seed), random_vector(32, seed + 1)

    def score(place: int) -> float:
        return float(turn(query, place + distance, config) @ turn(key, place, config))

    # The table is float32: an angle of 3,000 radians is known to 2^-13 or so.
    assert score(query_at + shift) == pytest.approx(score(query_at), abs=2e-2)


@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_rotary_is_multiplication_by_a_unit_complex_number(head_dim: int) -> None:
    """Dimensions i and i + d/2 are one complex number; its turn is e^(i position theta_i)."""
    num_tokens, num_heads, half = 50, 3, head_dim // 2
    config = make_config(head_dim)
    heads = random_vector(num_tokens * num_heads * head_dim, 5).view(num_tokens, num_heads, -1)
    positions = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:num_tokens]
    exponents = -torch.arange(half, dtype=torch.float64) * 2 / head_dim
    angles = positions[:, None].double() * 10_000.0**exponents
    as_complex = torch.complex(heads[..., :half], heads[..., half:])
    turned = as_complex * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)

    rotary = RotaryPositions(*rotary_table(config, 200), positions)
    cos, sin = rotary.cos_sin(torch.float64)
    torch.testing.assert_close(apply_rotary(heads, cos, sin), expected, atol=1e-4, rtol=0)


def test_position_zero_is_not_turned() -> None:
    vector = random_vector(16, 3)
    assert torch.equal(turn(vector, 0, make_config(16)), vector)


# Scaled frequencies. Our names on the left, what transformers reads on the right.


def frequencies_of_transformers(
    kind: str, head_dim: int, theta: float, parameters: dict[str, Any]
) -> tuple[Tensor, float]:
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters},
    )
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, attention_factor


SHAPES = [(64, 10_000.0), (128, 500_000.0), (48, 1_000_000.0)]
YARN = [
    {},
    {"beta_fast": 16.0, "beta_slow": 2.0},
    {"attention_factor": 0.7},
    {"mscale": 0.707, "mscale_all_dim": 1.0},
    {"truncate": False},
    {"beta_fast": 3.0, "beta_slow": 2.9, "truncate": False},
]


@pytest.mark.parametrize(("head_dim", "theta"), SHAPES)
@pytest.mark.parametrize("factor", [1.0, 4.0, 7.5])
def test_linear_frequencies(head_dim: int, theta: float, factor: float) -> None:
    ours, scale = rotary_frequencies(
        make_config(head_dim, theta, RopeScaling("linear", factor=factor))
    )
    theirs, their_scale = frequencies_of_transformers("linear", head_dim, theta, {"factor": factor})
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert scale == their_scale


@pytest.mark.parametrize(("head_dim", "theta"), SHAPES)
@pytest.mark.parametrize(
    ("factor", "low", "high", "original"),
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 16.0, 1024)],
)
def test_llama3_frequencies(
    head_dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> None:
    scaling = RopeScaling(
        "llama3",
        factor=factor,
        original_max_positions=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )
    ours, scale = rotary_frequencies(make_config(head_dim, theta, scaling))
    theirs, their_scale = frequencies_of_transformers(
        "llama3",
        head_dim,
        theta,
        {
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        },
    )
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    assert scale == their_scale
    plain, _ = rotary_frequencies(make_config(head_dim, theta))
    is_kept, is_divided = ours == plain, ours == plain / factor
    assert is_kept[0], "the fastest turn is kept"
    assert is_divided[-1], "the slowest is divided by the factor"
    assert (~is_kept & ~is_divided).any(), "and between them the two are blended"


@pytest.mark.parametrize(("head_dim", "theta"), SHAPES)
@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
@pytest.mark.parametrize("options", YARN, ids=str)
def test_yarn_frequencies_and_temperature(
    head_dim: int, theta: float, factor: float, options: dict[str, Any]
) -> None:
    scaling = RopeScaling("yarn", factor=factor, original_max_positions=4096, **options)
    ours, scale = rotary_frequencies(make_config(head_dim, theta, scaling))
    theirs, their_scale = frequencies_of_transformers(
        "yarn",
        head_dim,
        theta,
        {"factor": factor, "original_max_position_embeddings": 4096, **options},
    )
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    assert scale == pytest.approx(their_scale, rel=1e-12)


def test_yarns_temperature_is_carried_by_cos_and_sin() -> None:
    """So that every score is multiplied by its square (arXiv:2309.00071, section 3.4)."""
    config = make_config(64, scaling=RopeScaling("yarn", factor=16.0, original_max_positions=64))
    cos, sin = rotary_table(config, 50)
    temperature = 0.1 * math.log(16.0) + 1
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, temperature**2))
