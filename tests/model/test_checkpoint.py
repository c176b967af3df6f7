"""Loading checkpoints that are whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import load_checkpoint
from model.checkpoint_files import CheckpointError, read_checkpoint_info
from model.transformer import Transformer
from tests.model.tiny import GPT2, LLAMA, published_tensors, write, write_config, write_index
from tests.model.tiny import write_shards as write_sharded

TIED = LLAMA | {"tie_word_embeddings": True}


def parameters_equal(model: Transformer, tensors: dict[str, Tensor]) -> bool:
    """Whether a Llama's fused parameters are its tensors, joined."""
    attention = "model.layers.1.self_attn."
    qkv = torch.cat([tensors[f"{attention}{part}_proj.weight"] for part in "qkv"])
    gate_up = torch.cat(
        [tensors[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    )
    return (
        torch.equal(model.get_parameter("blocks.1.attention.qkv.weight"), qkv)
        and torch.equal(model.get_parameter("blocks.1.mlp.gate_up.weight"), gate_up)
        and torch.equal(model.embedding.weight, tensors["model.embed_tokens.weight"])
    )


def test_is_ready_to_run(tmp_path: Path) -> None:
    tensors = published_tensors(LLAMA)
    checkpoint = load_checkpoint(write(tmp_path, LLAMA, tensors))
    assert parameters_equal(checkpoint.model, tensors)
    assert not checkpoint.model.training
    assert not any(parameter.requires_grad for parameter in checkpoint.model.parameters())
    assert not any(parameter.is_meta for parameter in checkpoint.model.parameters())
    assert checkpoint.dtype == torch.float32
    assert checkpoint.directory == tmp_path
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (1, (2,))


def test_the_weights_do_not_hang_on_the_file(tmp_path: Path) -> None:
    """A file replaced or cut while the server runs must not reach the loaded weights."""
    tensors = published_tensors(LLAMA)
    checkpoint = load_checkpoint(write(tmp_path, LLAMA, tensors))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(bytes(file.seek(0, 2)))
        file.seek(0)
        file.write(bytes(4096))
    assert parameters_equal(checkpoint.model, tensors)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_the_stored_one_or_the_one_asked_for(tmp_path: Path, stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in published_tensors(LLAMA).items()}
    write(tmp_path, LLAMA, tensors)
    assert load_checkpoint(tmp_path).dtype == stored
    for asked in (torch.float32, torch.bfloat16):
        model = load_checkpoint(tmp_path, dtype=asked).model
        assert {parameter.dtype for parameter in model.parameters()} == {asked}


def test_all_parameters_get_the_dtype_of_the_embedding(tmp_path: Path) -> None:
    tensors = {
        name: tensor if "norm" in name else tensor.bfloat16()
        for name, tensor in published_tensors(LLAMA).items()
    }
    model = load_checkpoint(write(tmp_path, LLAMA, tensors)).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_max_positions_bounds_the_tables(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, published_tensors(LLAMA))
    assert load_checkpoint(tmp_path).model.position_tables[0].shape == (64, 4)
    model = load_checkpoint(tmp_path, max_positions=10).model
    assert model.position_tables[0].shape == (10, 4)


def test_shards_and_one_file_are_the_same(tmp_path: Path) -> None:
    tensors = published_tensors(LLAMA)
    write_sharded(tmp_path, LLAMA, tensors)
    assert parameters_equal(load_checkpoint(tmp_path).model, tensors)


def test_shards_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    tensors = published_tensors(LLAMA)
    write(tmp_path / "blobs", LLAMA, tensors)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert parameters_equal(load_checkpoint(tmp_path / "snapshot").model, tensors)


def test_pickled_weights(tmp_path: Path) -> None:
    tensors = published_tensors(LLAMA)
    write_config(tmp_path, LLAMA)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert parameters_equal(load_checkpoint(tmp_path).model, tensors)


def test_pickled_shards(tmp_path: Path) -> None:
    tensors = published_tensors(LLAMA)
    write_config(tmp_path, LLAMA)
    names = sorted(tensors)
    where = {}
    for file, part in (("a.bin", names[:5]), ("b.bin", names[5:])):
        torch.save({name: tensors[name] for name in part}, tmp_path / file)
        where |= dict.fromkeys(part, file)
    write_index(tmp_path, where, "pytorch_model.bin")
    assert parameters_equal(load_checkpoint(tmp_path).model, tensors)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_with_and_without_prefix(tmp_path: Path, prefix: str) -> None:
    tensors = published_tensors(GPT2, prefix)
    mask = torch.ones(1, 1, 64, 64)
    buffers = {f"{prefix}h.0.attn.bias": mask, f"{prefix}h.1.attn.masked_bias": torch.tensor(-1e4)}
    model = load_checkpoint(write(tmp_path, GPT2, tensors | buffers)).model
    stored = tensors[f"{prefix}h.1.attn.c_attn.weight"]
    assert stored.shape == (16, 48)
    assert torch.equal(model.get_parameter("blocks.1.attention.qkv.weight"), stored.t())
    assert model.lm_head.weight is model.embedding.weight


def test_old_rotary_buffers_are_let_through(tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    load_checkpoint(write(tmp_path, LLAMA, published_tensors(LLAMA) | buffer))


def test_tied_embeddings_are_one_parameter(tmp_path: Path) -> None:
    tensors = published_tensors(TIED)
    assert "lm_head.weight" not in tensors
    model = load_checkpoint(write(tmp_path, TIED, tensors)).model
    assert model.lm_head.weight is model.embedding.weight
    again = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    model = load_checkpoint(write(tmp_path, TIED, again)).model
    assert model.lm_head.weight is model.embedding.weight


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, LLAMA, published_tensors(LLAMA))
    load_checkpoint(tmp_path)
    assert capsys.readouterr() == ("", "")
    load_checkpoint(tmp_path, progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("config", "generation", "eos", "bos"),
    [
        ({}, None, (), None),
        ({"eos_token_id": 2, "bos_token_id": 1}, None, (2,), 1),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 4, 3]}, (3, 4), None),
        ({"eos_token_id": 2, "bos_token_id": 1}, {"temperature": 0.6}, (2,), 1),
        ({"eos_token_id": [2, 3]}, {"eos_token_id": None, "bos_token_id": 5}, (2, 3), 5),
    ],
)
def test_special_tokens(
    tmp_path: Path,
    config: dict[str, object],
    generation: dict[str, object] | None,
    eos: tuple[int, ...],
    bos: int | None,
) -> None:
    fields = {k: v for k, v in LLAMA.items() if not k.endswith("token_id")} | config
    write_config(tmp_path, fields)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokens = read_checkpoint_info(tmp_path).tokens
    assert (tokens.eos_token_ids, tokens.bos_token_id) == (eos, bos)


def test_learned_positions_cannot_be_stretched(tmp_path: Path) -> None:
    write(tmp_path, GPT2, published_tensors(GPT2))
    with pytest.raises(CheckpointError, match=r"positions end at 64; max_positions 65 was asked"):
        load_checkpoint(tmp_path, max_positions=65)
