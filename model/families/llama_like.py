"""What Llama, Mistral, Qwen2 and Qwen3 share: RMSNorm, rotary positions, SwiGLU and the
names of their tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from model.config import ModelConfig
from model.families.base import HARMLESS_FIELDS, Source, head_dim_of
from model.families.fields import MAX_LAYERS, MAX_POSITIONS, ConfigFields
from model.families.rope import read_rope
from model.families.windows import Windows, drop_idle

PREFIXES = ("model.", "")
EMBEDDING = "embed_tokens.weight"
# Early Llama checkpoints saved the rotary frequencies, which the config determines.
HARMLESS_TENSORS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class Traits:
    """In what one family differs from the others."""

    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    windows: Windows = ()


def num_layers_of(fields: ConfigFields) -> int:
    return fields.integer("num_hidden_layers", maximum=MAX_LAYERS)


def llama_like_config(fields: ConfigFields, family: str, traits: Traits) -> ModelConfig:
    """The fields all of them have, with this family's traits."""
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    head_dim = fields.optional_integer("head_dim") or traits.default_head_dim
    if head_dim is None:
        head_dim = head_dim_of(hidden_size, num_heads, "hidden_size", "num_attention_heads")
    fields.require("hidden_act", "silu")
    rope = read_rope(fields, fields.integer("max_position_embeddings", maximum=MAX_POSITIONS))
    # Some configs spell out that their halves are rotated, not their neighbours.
    fields.require("rope_interleaved", supported=False)
    config = ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers_of(fields),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        max_positions=rope.max_positions,
        norm="rmsnorm",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        mlp="swiglu",
        position="rotary",
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        qkv_bias=traits.qkv_bias,
        attention_out_bias=traits.attention_out_bias,
        mlp_bias=traits.mlp_bias,
        qk_norm=traits.qk_norm,
        tie_embeddings=fields.flag("tie_word_embeddings", default=False),
        sliding_windows=drop_idle(traits.windows, rope.max_positions),
        family=family,
    )
    fields.finish(HARMLESS_FIELDS)
    return config


def llama_like_sources(config: ModelConfig, prefix: str) -> dict[str, Source]:
    """Our names to theirs; `prefix` stands before the decoder's names."""
    sources = {
        "embedding.weight": Source((prefix + EMBEDDING,)),
        "final_norm.weight": Source((f"{prefix}norm.weight",)),
    }
    if not config.tie_embeddings:
        sources["lm_head.weight"] = Source(("lm_head.weight",))
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.", f"{prefix}layers.{layer}."
        sources[ours + "attention_norm.weight"] = Source((theirs + "input_layernorm.weight",))
        sources[ours + "mlp_norm.weight"] = Source((theirs + "post_attention_layernorm.weight",))
        sources |= _attention_sources(config, ours + "attention.", theirs + "self_attn.")
        sources |= _mlp_sources(config, ours + "mlp.", theirs + "mlp.")
    return sources


def _attention_sources(config: ModelConfig, ours: str, theirs: str) -> dict[str, Source]:
    rows = (config.query_size, config.kv_size, config.kv_size)
    sources = {}
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        names = tuple(f"{theirs}{part}_proj.{kind}" for part in "qkv")
        sources[f"{ours}qkv.{kind}"] = Source(names, rows)
    for kind in ("weight", "bias") if config.attention_out_bias else ("weight",):
        sources[f"{ours}out.{kind}"] = Source((f"{theirs}o_proj.{kind}",))
    if config.qk_norm:
        sources[ours + "query_norm.weight"] = Source((theirs + "q_norm.weight",))
        sources[ours + "key_norm.weight"] = Source((theirs + "k_norm.weight",))
    return sources


def _mlp_sources(config: ModelConfig, ours: str, theirs: str) -> dict[str, Source]:
    rows = (config.intermediate_size, config.intermediate_size)
    sources = {}
    for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
        names = (f"{theirs}gate_proj.{kind}", f"{theirs}up_proj.{kind}")
        sources[f"{ours}gate_up.{kind}"] = Source(names, rows)
        sources[f"{ours}down.{kind}"] = Source((f"{theirs}down_proj.{kind}",))
    return sources
