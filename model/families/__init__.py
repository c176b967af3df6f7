"""Published families of checkpoints: what their config.json says and how they name their
tensors. Plain Python, importable without torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from model.config import ModelConfig
from model.families.base import Family, Source, check_common
from model.families.fields import ConfigFields, UnsupportedConfigError
from model.families.gpt2 import GPT2
from model.families.llama import LLAMA
from model.families.mistral import MISTRAL
from model.families.qwen import QWEN2, QWEN3

__all__ = ["FAMILIES", "Family", "Source", "UnsupportedConfigError", "family_of", "read_config"]

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(raw: Mapping[str, object]) -> Family:
    """The family a config.json names in `model_type`. Raises `ConfigError`."""
    model_type = ConfigFields(raw).text("model_type")
    if model_type not in FAMILIES:
        raise UnsupportedConfigError("model_type", model_type, f"{', '.join(FAMILIES)} are")
    return FAMILIES[model_type]


def read_config(raw: Mapping[str, object]) -> ModelConfig:
    """The architecture that a parsed config.json describes.

    Raises `ConfigError` for a field that is missing, of the wrong type, out of bounds or at
    odds with another, and `UnsupportedConfigError` for one that asks for what is not
    implemented; the message names the field, its value and what would do.
    """
    family = family_of(raw)
    fields = ConfigFields(raw)
    check_common(fields, family)
    return family.read(fields)
