"""Llama 2 and 3.x, and everything published in their shape (SmolLM, TinyLlama, ...)."""

from __future__ import annotations

from model.config import ModelConfig
from model.families import llama_like
from model.families.base import Family
from model.families.fields import ConfigFields
from model.families.windows import same_window


def read(fields: ConfigFields) -> ModelConfig:
    """config.json of a Llama; `attention_bias` is on all four projections."""
    bias = fields.flag("attention_bias", default=False)
    return llama_like.llama_like_config(
        fields,
        "llama",
        llama_like.Traits(
            qkv_bias=bias,
            attention_out_bias=bias,
            mlp_bias=fields.flag("mlp_bias", default=False),
            windows=same_window(fields, None, llama_like.num_layers_of(fields)),
        ),
    )


LLAMA = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    read=read,
    sources=llama_like.llama_like_sources,
    prefixes=llama_like.PREFIXES,
    embedding=llama_like.EMBEDDING,
    harmless_tensors=llama_like.HARMLESS_TENSORS,
)
