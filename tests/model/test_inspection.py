"""The numbers `vitrine inspect` shows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from model.checkpoint_files import CheckpointError
from model.families import read_config
from model.families.published import PUBLISHED
from model.inspection import Inspection, Matrix, find_config, inspect, render
from model.transformer import Transformer


def matrix(inspection: Inspection, name: str) -> Matrix:
    (found,) = (matrix for matrix in inspection.matrices if matrix.name == name)
    return found


def test_gpt2_small() -> None:
    gpt2 = inspect(find_config("gpt2"))
    queries = matrix(gpt2, "W_Q")
    assert queries.size == 768 * 64 == 49_152
    assert queries.size * queries.per_layer == 589_824
    assert queries.total == gpt2.total("W_K") == gpt2.total("W_V") == 7_077_888
    assert gpt2.num_parameters == 124_439_808
    assert gpt2.weight_bytes(torch.float32) == 497_759_232
    assert gpt2.kv_bytes_per_token(torch.bfloat16) == 2 * 12 * 768 * 2


def test_llama_2_7b() -> None:
    llama = inspect(find_config("Llama-2-7B"))
    assert matrix(llama, "W_Q").size == 4096 * 128 == 524_288
    assert llama.num_parameters == 6_738_415_616


def test_grouped_queries_have_fewer_keys() -> None:
    llama = inspect(find_config("llama-3.1-8b"))
    assert llama.total("W_Q") == 4 * llama.total("W_K")
    assert llama.kv_bytes_per_token(torch.bfloat16) == 131_072


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_matrices_are_all_there_is(name: str) -> None:
    inspection = inspect(read_config(PUBLISHED[name]))
    assert sum(matrix.total for matrix in inspection.matrices) == inspection.num_parameters


def test_every_bias_and_norm_is_counted() -> None:
    fields: dict[str, object] = {
        "model_type": "qwen3",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "max_position_embeddings": 64,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    }
    config = read_config(fields)
    inspection = inspect(config)
    real = sum(parameter.numel() for parameter in Transformer(config).parameters())
    assert inspection.num_parameters == real
    assert sum(matrix.total for matrix in inspection.matrices) == real
    text = shown(inspection)
    assert "multi-query" in text
    assert "a window of 16 in 2 layers" in text
    assert "query norm weight" in text


def test_finds_a_directory_a_file_and_a_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED["gpt2"]))
    assert find_config(str(tmp_path)) == find_config(str(path)) == find_config("gpt2")


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gpt-5 is neither .* one of gpt2, gpt2-medium"):
        find_config("gpt-5")
    with pytest.raises(CheckpointError, match=r"no config.json in it"):
        find_config(str(tmp_path))


def test_shows_the_figures() -> None:
    text = shown(inspect(find_config("gpt2")))
    for figure in ("49,152", "7,077,888", "124,439,808", "497,759,232 (474.7 MiB)", "768 x 768"):
        assert figure in text


def shown(inspection: Inspection) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(render(inspection))
    return out.getvalue()
