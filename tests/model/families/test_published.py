"""The numbers we carry give the parameter counts that the publishers state."""

from __future__ import annotations

import pytest

from model.families import read_config
from model.families.published import PUBLISHED
from model.inspection import inspect

COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm-135m": 134_515_008,
    "stories15m": 15_191_712,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameter_counts(name: str) -> None:
    assert inspect(read_config(PUBLISHED[name])).num_parameters == COUNTS[name]
