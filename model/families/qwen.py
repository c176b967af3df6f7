"""Qwen2, Qwen2.5 and Qwen3: Llamas with biases on query, key and value (2) or a norm on
each head's query and key (3), and windows in the later layers when asked for.
"""

from __future__ import annotations

from model.config import ModelConfig
from model.families import llama_like
from model.families.base import Family
from model.families.fields import ConfigFields
from model.families.windows import qwen_windows


def read_qwen2(fields: ConfigFields) -> ModelConfig:
    """config.json of a Qwen2 or 2.5: the biases are always there, and no field says so."""
    windows = qwen_windows(fields, llama_like.num_layers_of(fields))
    traits = llama_like.Traits(qkv_bias=True, windows=windows)
    return llama_like.llama_like_config(fields, "qwen2", traits)


def read_qwen3(fields: ConfigFields) -> ModelConfig:
    """config.json of a Qwen3; a `head_dim` that is not there is 128."""
    bias = fields.flag("attention_bias", default=False)
    traits = llama_like.Traits(
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm=True,
        default_head_dim=128,
        windows=qwen_windows(fields, llama_like.num_layers_of(fields)),
    )
    return llama_like.llama_like_config(fields, "qwen3", traits)


QWEN2 = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    read=read_qwen2,
    sources=llama_like.llama_like_sources,
    prefixes=llama_like.PREFIXES,
    embedding=llama_like.EMBEDDING,
    harmless_tensors=llama_like.HARMLESS_TENSORS,
)

QWEN3 = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    read=read_qwen3,
    sources=llama_like.llama_like_sources,
    prefixes=llama_like.PREFIXES,
    embedding=llama_like.EMBEDDING,
    harmless_tensors=llama_like.HARMLESS_TENSORS,
)
