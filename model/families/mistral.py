"""Mistral: a Llama whose layers may all share one sliding window."""

from __future__ import annotations

from model.config import ModelConfig
from model.families import llama_like
from model.families.base import Family
from model.families.fields import ConfigFields
from model.families.windows import same_window


def read(fields: ConfigFields) -> ModelConfig:
    """config.json of a Mistral. A `sliding_window` of null is none; one that is not there
    at all means 4,096, as in the configuration class the family was published with."""
    window = fields.optional_integer("sliding_window") if fields.has("sliding_window") else 4096
    return llama_like.llama_like_config(
        fields,
        "mistral",
        llama_like.Traits(windows=same_window(fields, window, llama_like.num_layers_of(fields))),
    )


MISTRAL = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    read=read,
    sources=llama_like.llama_like_sources,
    prefixes=llama_like.PREFIXES,
    embedding=llama_like.EMBEDDING,
    harmless_tensors=llama_like.HARMLESS_TENSORS,
)
