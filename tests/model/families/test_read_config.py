"""config.json to ModelConfig: every field that matters is read, and every other refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ConfigError, ModelConfig
from model.families import FAMILIES, UnsupportedConfigError, read_config

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
MINIMAL: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 100,
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 128,
    },
    **{
        model_type: LLAMA_LIKE | {"model_type": model_type}
        for model_type in ("llama", "mistral", "qwen2", "qwen3")
    },
}


def read(model_type: str, /, **changes: object) -> ModelConfig:
    return read_config(MINIMAL[model_type] | changes)


def test_every_family_has_a_minimal_config_here() -> None:
    assert set(MINIMAL) == set(FAMILIES)


def test_what_is_not_said_has_the_published_defaults() -> None:
    gpt2, llama, mistral, qwen2, qwen3 = (read(model_type) for model_type in MINIMAL)
    assert gpt2.intermediate_size == 256
    assert gpt2.tie_embeddings
    assert gpt2.mlp == "gelu_tanh"
    assert (gpt2.qkv_bias, gpt2.attention_out_bias, gpt2.mlp_bias) == (True, True, True)
    assert llama.head_dim == 16
    assert llama.num_kv_heads == 4
    assert (llama.rope_theta, llama.norm_eps) == (10_000.0, 1e-6)
    assert not llama.tie_embeddings
    assert mistral.sliding_windows == ()  # 4,096 of at most 128 positions hides nothing
    assert (qwen2.qkv_bias, qwen2.attention_out_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


def test_a_head_may_have_a_size_of_its_own() -> None:
    assert read("llama", head_dim=24, num_key_value_heads=2).kv_size == 48


def test_mistral_windows() -> None:
    assert read("mistral", sliding_window=32).sliding_windows == (32,) * 4
    assert read("mistral", sliding_window=None).sliding_windows == ()
    assert read("mistral", max_position_embeddings=8192).sliding_windows == (4096,) * 4
    types = ["sliding_attention"] * 4
    assert read("mistral", sliding_window=32, layer_types=types).sliding_windows == (32,) * 4


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_windows(model_type: str) -> None:
    assert read(model_type, sliding_window=32).sliding_windows == ()
    use = {"use_sliding_window": True, "sliding_window": 32}
    windows = read(model_type, **use, max_window_layers=3).sliding_windows
    assert windows == (None, None, None, 32)
    assert read(model_type, **use).sliding_windows == ()  # max_window_layers is 28
    types = ["sliding_attention", "full_attention"] * 2
    windows = read(model_type, **use, layer_types=types).sliding_windows
    assert windows == (32, None, 32, None)


def test_fields_that_change_no_number_are_let_through() -> None:
    config = read(
        "llama",
        architectures=["LlamaForCausalLM"],
        torch_dtype="bfloat16",
        transformers_version="4.31.0",
        pretraining_tp=1,
        use_cache=True,
        initializer_range=0.02,
        rope_interleaved=False,
        is_llama_config=True,
        _name_or_path="somewhere",
        something_new=None,
        something_else=False,
        quantization_config=None,
    )
    assert config == read("llama")


@pytest.mark.parametrize(
    ("model_type", "change", "field", "supported"),
    [
        ("llama", {"model_type": "gemma3"}, "model_type", "gpt2, llama, mistral, qwen2, qwen3"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act", "'silu'"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "architectures", "Causal"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config", "unquantized"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved", "False"),
        ("llama", {"logit_scale": 0.5}, "logit_scale", "no field of that name"),
        ("llama", {"sliding_window": 128}, "sliding_window", "no field of that name"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder", "False"),
        ("llama", {"is_encoder_decoder": 1}, "is_encoder_decoder", "False"),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types[0]", "full_attention"),
        ("mistral", {"mlp_bias": True}, "mlp_bias", "no field of that name"),
        (
            "mistral",
            {"sliding_window": 32, "layer_types": ["full_attention"] * 4},
            "layer_types[0]",
            "only sliding_attention is in this family with sliding_window 32",
        ),
        ("qwen2", {"layer_types": ["linear_attention"] * 4}, "layer_types[0]", "full_attention"),
        ("gpt2", {"activation_function": "relu"}, "activation_function", "gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse", "False"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights", "True"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn", "False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention", "False"),
        ("gpt2", {"rope_theta": 10_000.0}, "rope_theta", "no field of that name"),
    ],
)
def test_names_what_it_does_not_do(
    model_type: str, change: dict[str, object], field: str, supported: str
) -> None:
    with pytest.raises(UnsupportedConfigError) as caught:
        read(model_type, **change)
    (value,) = change.values() if len(change) == 1 else [caught.value.value]
    message = str(caught.value)
    assert message.startswith(field)
    assert supported in caught.value.supported
    assert repr(value) in message or repr(caught.value.value) in message


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"model_type": None}, "model_type is missing"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"hidden_size": "64"}, "hidden_size must be a whole number, got '64'"),
        ("llama", {"hidden_size": 64.0}, "hidden_size must be a whole number, got 64.0"),
        ("llama", {"vocab_size": True}, "vocab_size must be a whole number, got True"),
        ("llama", {"vocab_size": 0}, "vocab_size must lie between 1 and 16777216, got 0"),
        (
            "llama",
            {"num_hidden_layers": 10**9},
            "num_hidden_layers must lie between 1 and 10000, got 1000000000",
        ),
        ("llama", {"rms_norm_eps": 0}, "norm_eps must be positive, got 0.0"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite, got nan"),
        ("llama", {"attention_bias": "yes"}, "attention_bias must be true or false, got 'yes'"),
        (
            "llama",
            {"num_attention_heads": 5},
            "hidden_size 64 is not a multiple of num_attention_heads 5",
        ),
        (
            "llama",
            {"num_key_value_heads": 3},
            "num_heads 4 is not a multiple of num_kv_heads 3",
        ),
        ("gpt2", {"n_head": 5}, "n_embd 64 is not a multiple of n_head 5"),
        ("gpt2", {"n_ctx": 64}, "n_ctx is 64 but n_positions is 128"),
        (
            "qwen2",
            {"layer_types": ["full_attention"] * 3},
            "layer_types has 3 entries but num_hidden_layers is 4",
        ),
        ("qwen2", {"layer_types": "all"}, "layer_types must be a list of strings, got 'all'"),
        (
            "qwen2",
            {"layer_types": ["full_attention", *["sliding_attention"] * 3], "sliding_window": 9},
            "layer_types[1] is sliding_attention but use_sliding_window is false "
            "and sliding_window 9",
        ),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 2,
                "layer_types": ["full_attention"] * 4,
            },
            "use_sliding_window is true and max_window_layers 2 of 4 layers, "
            "but layer_types has only full_attention",
        ),
    ],
)
def test_names_the_value_that_is_wrong(
    model_type: str, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(model_type, **change)
    assert str(caught.value) == message


FIELDS = sorted(
    set(LLAMA_LIKE)
    | set(MINIMAL["gpt2"])
    | {
        "head_dim",
        "num_key_value_heads",
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "attention_bias",
        "tie_word_embeddings",
        "architectures",
        "quantization_config",
        "n_inner",
        "n_ctx",
        "layer_norm_epsilon",
        "anything",
    }
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "silu", "yarn", "linear", "llama", "sliding_attention"])
    | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "rope_type", "factor", "rope_theta", "truncate"]), inner
        )
    ),
    max_leaves=6,
)


@given(
    model_type=st.sampled_from(sorted(MINIMAL)),
    changes=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4),
)
def test_any_json_gives_a_config_or_a_config_error(
    model_type: str, changes: dict[str, object]
) -> None:
    refused = None
    try:
        assert isinstance(read(model_type, **changes), ModelConfig)
    except ConfigError as error:
        refused = str(error)
    assert refused is None or ("\n" not in refused and len(refused) < 400)


def test_imports_no_torch() -> None:
    code = (
        "import sys, model.checkpoint_files, model.families.published, model.hub\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
