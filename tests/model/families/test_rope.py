"""Rotary frequencies equal those of transformers' own table of functions, in both forms a
config.json may give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.config import ConfigError
from model.families import UnsupportedConfigError, read_config
from model.positions import rotary_frequencies

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}

factors = st.floats(1.0, 64.0)
thetas = st.floats(100.0, 1e7)
lengths = st.integers(64, 4096)
linear = st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factors})
llama3 = st.fixed_dictionaries(
    {
        "rope_type": st.just("llama3"),
        "factor": factors,
        "low_freq_factor": st.floats(0.5, 2.0),
        "high_freq_factor": st.floats(2.5, 8.0),
        "original_max_position_embeddings": lengths,
    }
)
yarn = st.fixed_dictionaries(
    {
        "rope_type": st.just("yarn"),
        "factor": factors,
        "original_max_position_embeddings": lengths,
    },
    optional={
        "beta_fast": st.floats(8.0, 64.0),
        "beta_slow": st.floats(0.5, 4.0),
        "attention_factor": st.floats(0.1, 2.0),
        "mscale": st.floats(0.1, 2.0),
        "mscale_all_dim": st.floats(0.1, 2.0),
        "truncate": st.booleans(),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    scaling=st.one_of(linear, llama3, yarn),
    theta=thetas,
    head_dim=st.sampled_from([8, 16, 64, 128]),
    old_form=st.booleans(),
)
def test_frequencies_equal(
    scaling: dict[str, Any], theta: float, head_dim: int, old_form: bool
) -> None:
    transformers.utils.logging.set_verbosity_error()
    fields = BASE | {"head_dim": head_dim}
    parameters = scaling | {"rope_theta": theta}
    theirs, their_scale = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](
        transformers.LlamaConfig(**fields, rope_parameters=dict(parameters))
    )
    if old_form:
        kind = scaling["rope_type"]
        scaling = {k: v for k, v in scaling.items() if k != "rope_type"} | {"type": kind}
        config = read_config(fields | {"rope_theta": theta, "rope_scaling": scaling})
    else:
        config = read_config(fields | {"rope_parameters": parameters})
    ours, our_scale = rotary_frequencies(config)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    assert our_scale == pytest.approx(their_scale, rel=1e-12)


@given(theta=thetas, head_dim=st.sampled_from([8, 64, 128]))
def test_unscaled_frequencies_are_the_equation(theta: float, head_dim: int) -> None:
    config = read_config(BASE | {"head_dim": head_dim, "rope_theta": theta})
    ours, scale = rotary_frequencies(config)
    expected = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    assert ours.tolist() == pytest.approx(expected, rel=1e-5)
    assert scale == 1.0


def test_yarn_without_a_factor_takes_it_from_the_two_lengths() -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 1024}
    config = read_config(BASE | {"rope_scaling": scaling})
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 4.0


@pytest.mark.parametrize(("maximum", "reach"), [(1024, 8192), (8192, 8192), (10_000, 10_000)])
def test_yarn_reaches_as_far_as_its_factor_says(maximum: int, reach: int) -> None:
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024}
    config = read_config(BASE | {"max_position_embeddings": maximum, "rope_scaling": scaling})
    assert config.max_positions == reach


def test_both_forms_may_stand_beside_each_other_when_they_agree() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = read_config(BASE | {"rope_scaling": scaling, "rope_parameters": dict(scaling)})
    assert config.rope_scaling is not None


def llama3_with(**changes: object) -> dict[str, object]:
    return {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    } | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.type is 'dynamic', which is not supported: "
            "default, linear, llama3 and yarn are",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_parameters.rope_type is 'longrope', which is not supported: "
            "default, linear, llama3 and yarn are",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1, 2]}},
            "rope_scaling.mrope_section is [1, 2], which is not supported: "
            "no field of that name is known here",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
            "rope_scaling.beta_fast is 32, which is not supported: "
            "no field of that name is known here",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5, which is not supported: "
            "only 1.0, rotating whole heads, is",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "rope_parameters.partial_rotary_factor is 0.25, which is not supported: "
            "only 1.0, rotating whole heads, is",
        ),
    ],
)
def test_names_what_it_does_not_do(change: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedConfigError) as caught:
        read_config(BASE | change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta is 10000.0 but rope_parameters.rope_theta is 500000.0: they must agree",
        ),
        (
            {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
            "rope_scaling.type is 'yarn' but rope_scaling.rope_type is 'linear': they must agree",
        ),
        (
            {"rope_scaling": {"factor": 2}, "rope_parameters": {"factor": 3}},
            "rope_scaling is {'factor': 2} but rope_parameters is {'factor': 3}: they must agree",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "the rotary scaling factor must be at least 1, got 0.5",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            "rope_scaling.factor must be a number, got '2'",
        ),
        (
            {"rope_scaling": llama3_with(low_freq_factor=4.0)},
            "llama3 scaling needs 0 < low_freq_factor < high_freq_factor, got 4.0 and 4.0",
        ),
        (
            {"rope_scaling": llama3_with(high_freq_factor=None)},
            "rope_scaling.high_freq_factor is missing",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}},
            "yarn scaling needs 0 < beta_slow <= beta_fast, got 2.0 and 1.0",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 1e9}},
            "rope_scaling.original_max_position_embeddings 4096 times rope_scaling.factor "
            "1000000000.0 is beyond 16777216 positions",
        ),
        ({"rope_theta": 1}, "rope_theta must be above 1, got 1.0"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        ({"head_dim": 15}, "rotary positions need an even head_dim, got head_dim 15"),
    ],
)
def test_names_both_numbers_that_disagree(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(BASE | change)
    assert str(caught.value) == message
