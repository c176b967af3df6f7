"""What a family is: how to read its config.json, and where each of our parameters lies in
its published checkpoints. Plain data and functions, without torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from model.config import ConfigError, ModelConfig
from model.families.fields import ConfigFields, UnsupportedConfigError

# Fields that change no number of a forward pass: training, bookkeeping, other heads, and
# the sampling defaults that old config.json files carry (a request brings its own).
_HARMLESS = """
    architectures model_type transformers_version torch_dtype dtype auto_map name_or_path
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id
    use_cache initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop
    attn_pdrop classifier_dropout dropout pretraining_tp output_attentions output_hidden_states
    return_dict return_dict_in_generate output_scores gradient_checkpointing tokenizer_class
    task_specific_params problem_type id2label label2id num_labels finetuning_task
    summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj chunk_size_feed_forward attn_implementation
    do_sample early_stopping length_penalty max_length min_length max_new_tokens
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences repetition_penalty
    diversity_penalty encoder_no_repeat_ngram_size temperature top_k top_p typical_p
    is_llama_config unsloth_fixed unsloth_version transformers.js_config
"""
HARMLESS_FIELDS = frozenset(_HARMLESS.split())


@dataclass(frozen=True, slots=True)
class Source:
    """Where one of our parameters comes from: published tensors, joined on dimension 0.

    `rows` says how many rows each of several tensors gives (one tensor gives them all).
    `transposed`: stored as (inputs, outputs), so it is turned before use.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One published family of checkpoints.

    `sources(config, prefix)` maps every name of `Transformer.state_dict()` (without the
    `lm_head.weight` of tied embeddings) to its source. `prefixes` are what checkpoints put
    before the names of the decoder; which one a checkpoint uses is seen from where
    `embedding` is found. `harmless_tensors` matches tensors that hold no weights.
    """

    model_type: str
    architectures: tuple[str, ...]
    read: Callable[[ConfigFields], ModelConfig]
    sources: Callable[[ModelConfig, str], dict[str, Source]]
    prefixes: tuple[str, ...]
    embedding: str
    harmless_tensors: re.Pattern[str]

    def prefix(self, names: frozenset[str]) -> str:
        """The prefix that a checkpoint with these tensor names uses (the usual one when the
        embedding is nowhere, so that its name is what an error will miss)."""
        for prefix in self.prefixes:
            if prefix + self.embedding in names:
                return prefix
        return self.prefixes[0]


def check_common(fields: ConfigFields, family: Family) -> None:
    """What no family does: quantized weights, encoder-decoders, other heads."""
    quantization = fields.get("quantization_config")
    if quantization:
        raise UnsupportedConfigError(
            "quantization_config", quantization, "only unquantized weights are"
        )
    fields.require("is_encoder_decoder", supported=False)
    fields.require("add_cross_attention", supported=False)
    # true is what decoders say of themselves, and false is written for them as well.
    fields.flag("is_decoder", default=False)
    architectures = fields.texts("architectures")
    for architecture in architectures or ():
        if architecture not in family.architectures:
            raise UnsupportedConfigError(
                "architectures", list(architectures or ()), f"only {family.architectures[0]} is"
            )


def head_dim_of(hidden_size: int, num_heads: int, size_name: str, heads_name: str) -> int:
    """hidden_size / num_heads. Raises `ConfigError` with both when it is not whole."""
    if hidden_size % num_heads:
        raise ConfigError(
            f"{size_name} {hidden_size} is not a multiple of {heads_name} {num_heads}"
        )
    return hidden_size // num_heads
