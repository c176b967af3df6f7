"""GPT-2: LayerNorm, learned positions, GELU, and matrices stored as (inputs, outputs)."""

from __future__ import annotations

import re

from model.config import ConfigError, Mlp, ModelConfig
from model.families.base import HARMLESS_FIELDS, Family, Source, head_dim_of
from model.families.fields import (
    MAX_LAYERS,
    MAX_POSITIONS,
    ConfigFields,
    UnsupportedConfigError,
)

ACTIVATIONS: dict[str, Mlp] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}


def read(fields: ConfigFields) -> ModelConfig:
    """config.json of a GPT-2."""
    hidden_size, num_heads = fields.integer("n_embd"), fields.integer("n_head")
    max_positions = fields.integer("n_positions", maximum=MAX_POSITIONS)
    context = fields.integer("n_ctx", max_positions)
    if context != max_positions:
        raise ConfigError(f"n_ctx is {context} but n_positions is {max_positions}")
    activation = fields.text("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise UnsupportedConfigError(
            "activation_function", activation, f"{', '.join(ACTIVATIONS)} are"
        )
    fields.require("scale_attn_weights", supported=True)
    fields.require("scale_attn_by_inverse_layer_idx", supported=False)
    fields.require("reorder_and_upcast_attn", supported=False)
    config = ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=fields.integer("n_layer", maximum=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim_of(hidden_size, num_heads, "n_embd", "n_head"),
        intermediate_size=fields.integer("n_inner", 4 * hidden_size),
        max_positions=max_positions,
        norm="layernorm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        mlp=ACTIVATIONS[activation],
        position="learned",
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        family="gpt2",
    )
    fields.finish(HARMLESS_FIELDS)
    return config


def sources(config: ModelConfig, prefix: str) -> dict[str, Source]:
    """Our names to theirs; query, key and value already lie side by side in c_attn."""
    found = {
        "embedding.weight": Source((prefix + EMBEDDING,)),
        "position_embedding.weight": Source((f"{prefix}wpe.weight",)),
    }
    if not config.tie_embeddings:
        found["lm_head.weight"] = Source(("lm_head.weight",))
    norms = {"final_norm": f"{prefix}ln_f"}
    matrices: dict[str, str] = {}
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.", f"{prefix}h.{layer}."
        norms |= {ours + "attention_norm": theirs + "ln_1", ours + "mlp_norm": theirs + "ln_2"}
        matrices |= {
            ours + "attention.qkv": theirs + "attn.c_attn",
            ours + "attention.out": theirs + "attn.c_proj",
            ours + "mlp.up": theirs + "mlp.c_fc",
            ours + "mlp.down": theirs + "mlp.c_proj",
        }
    for name, theirs in (norms | matrices).items():
        found[name + ".weight"] = Source((theirs + ".weight",), transposed=name in matrices)
        found[name + ".bias"] = Source((theirs + ".bias",))
    return found


EMBEDDING = "wte.weight"

GPT2 = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    read=read,
    sources=sources,
    prefixes=("transformer.", ""),
    embedding=EMBEDDING,
    # The causal mask, saved as a buffer by early versions.
    harmless_tensors=re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"),
)
