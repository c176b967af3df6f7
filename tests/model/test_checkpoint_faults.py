"""Checkpoints that are broken: each is refused with one line that names what is wrong."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.checkpoint import load_checkpoint
from model.checkpoint_files import CheckpointError, find_weights, read_checkpoint_info
from tests.model.tiny import (
    LLAMA,
    published_tensors,
    write,
    write_config,
    write_index,
    write_shards,
)

TIED = LLAMA | {"tie_word_embeddings": True}
TENSORS = published_tensors(LLAMA)
K_PROJ = "model.layers.0.self_attn.k_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
anywhere = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def refusal(directory: Path, **options: Any) -> str:
    """The one line with which a checkpoint is refused, without the directory's name."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(directory, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message.replace(str(directory), "DIR")


# The directory and its JSON files


def test_no_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent") == "DIR: no such directory"


def test_no_config(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "DIR: no config.json in it"


def test_no_weights(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA)
    assert refusal(tmp_path) == (
        "DIR: no weights in it (looked for model.safetensors, model.safetensors.index.json, "
        "pytorch_model.bin, pytorch_model.bin.index.json)"
    )


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON (Expecting value"),
        (b'{"model_type": "llama"', "not valid JSON (Expecting ',' delimiter"),
        (b"\xff\xfe{", "not valid JSON ("),
        (b"[" * 100_000, "not valid JSON (maximum recursion depth"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON (Exceeds the limit"),
        (b"[1, 2]", "must hold a JSON object, got [1, 2]"),
    ],
    ids=["empty", "cut", "not text", "deep", "long number", "list"],
)
def test_malformed_json(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_config(tmp_path, LLAMA)
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path).startswith(f"DIR/{name}: {message}")


def test_oversized_json(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    assert refusal(tmp_path) == "DIR/config.json: 67108865 bytes, at most 67108864 are read"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type is 'mamba', which is not supported: gpt2, llama, mistral, qwen2, qwen3 are",
        ),
        ({"eos_token_id": 40}, "eos_token_id 40 is no token of a vocabulary of 40"),
        ({"eos_token_id": [2, -1]}, "eos_token_id -1 is no token of a vocabulary of 40"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be token ids, got '</s>'"),
        ({"bos_token_id": True}, "bos_token_id must be a token id, got True"),
        ({"bos_token_id": [1, 2]}, "bos_token_id must be a token id, got [1, 2]"),
        (
            {"hidden_act": "gelu"},
            "hidden_act is 'gelu', which is not supported: only 'silu' is",
        ),
        (
            {"num_key_value_heads": 3},
            "num_heads 4 is not a multiple of num_kv_heads 3",
        ),
    ],
)
def test_config_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write(tmp_path, LLAMA | change, TENSORS)
    assert refusal(tmp_path) == f"DIR/config.json: {message}"


# safetensors files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("whole")
    return (write(directory, LLAMA, TENSORS) / "model.safetensors").read_bytes()


@given(data=st.data())
@anywhere
def test_truncated_anywhere(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(whole) - 1))
    write_config(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").write_bytes(whole[:size])
    assert refusal(tmp_path).startswith(
        f"DIR/model.safetensors: not a whole safetensors file of {size} bytes ("
    )


@given(data=st.data())
@anywhere
def test_a_byte_changed_anywhere(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    """Loads, when the byte was a harmless bit of a weight, or is refused in one line."""
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    position = data.draw(st.integers(0, header) | st.integers(0, len(whole) - 1))
    broken = bytearray(whole)
    broken[position] ^= data.draw(st.integers(1, 255))
    write_config(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").write_bytes(broken)
    refused = ""
    try:
        load_checkpoint(tmp_path)
    except CheckpointError as error:
        refused = str(error)
    assert "\n" not in refused


def test_another_file_under_that_name(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)
    assert "not a whole safetensors file of 68 bytes" in refusal(tmp_path)


# Tensors


def without(*names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in TENSORS.items() if name not in names}


def test_missing_tensor(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, without(K_PROJ))
    assert refusal(tmp_path) == (
        f"DIR: tensor {K_PROJ} is missing; a llama of 2 layers has 21 tensors, 20 of them are there"
    )


def test_missing_head_of_untied_embeddings(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, without("lm_head.weight"))
    assert refusal(tmp_path) == (
        "DIR: tensor lm_head.weight is missing; a llama of 2 layers with untied embeddings "
        "has 21 tensors, 20 of them are there"
    )


def test_tensors_of_another_family(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, {"wte.weight": torch.ones(2)})
    assert refusal(tmp_path).startswith(f"DIR: tensor {EMBEDDING} and 20 more are missing; a llama")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "score.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
    ],
)
def test_unknown_tensor(tmp_path: Path, name: str) -> None:
    write(tmp_path, LLAMA, TENSORS | {name: torch.ones(4)})
    assert refusal(tmp_path) == (
        f"DIR: tensor {name} is unknown; nothing in a llama of 2 layers as its config "
        "describes it has this name"
    )


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (K_PROJ, (16, 16), (8, 16)),
        (EMBEDDING, (41, 16), (40, 16)),
        ("model.norm.weight", (15,), (16,)),
        ("model.norm.weight", (), (16,)),
        ("model.layers.1.mlp.up_proj.weight", (16, 24), (24, 16)),
        ("model.layers.1.mlp.down_proj.weight", (16, 24, 1), (16, 24)),
    ],
)
def test_wrong_shape(
    tmp_path: Path, name: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    write(tmp_path, LLAMA, TENSORS | {name: torch.ones(shape)})
    assert refusal(tmp_path) == f"tensor {name} has shape {shape}, the config says {expected}"


def test_shares_of_a_fused_parameter_are_checked_one_by_one(tmp_path: Path) -> None:
    """q and k of each other's size have together the rows the parameter has."""
    attention = "model.layers.0.self_attn."
    swapped = {
        f"{attention}q_proj.weight": torch.ones(8, 16),
        f"{attention}k_proj.weight": torch.ones(16, 16),
    }
    write(tmp_path, LLAMA, TENSORS | swapped)
    assert refusal(tmp_path) == (
        f"tensor {attention}q_proj.weight has shape (8, 16), the config says (16, 16)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head_dim": 2**24, "num_attention_heads": 2**20, "hidden_size": 2**24},
            "no such model can be built (",
        ),
        ({"head_dim": 2**20, "max_position_embeddings": 2**24}, "tensor model.layers.0"),
        ({"vocab_size": 2**24, "hidden_size": 2**20}, f"tensor {EMBEDDING} has shape (40, 16)"),
    ],
)
def test_sizes_that_no_memory_holds(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    """Refused before anything of that size is allocated."""
    write(tmp_path, LLAMA | change, TENSORS)
    assert refusal(tmp_path).startswith(message)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ((float("nan"),), "1 NaN and 0 infinite"),
        ((float("inf"), float("-inf")), "0 NaN and 2 infinite"),
        ((float("nan"), float("inf"), float("nan")), "2 NaN and 1 infinite"),
    ],
)
@pytest.mark.parametrize("name", [K_PROJ, EMBEDDING, "lm_head.weight"])
def test_not_finite(tmp_path: Path, name: str, values: tuple[float, ...], found: str) -> None:
    tensor = TENSORS[name].clone()
    tensor[-1, : len(values)] = torch.tensor(values)
    write(tmp_path, LLAMA, TENSORS | {name: tensor})
    assert refusal(tmp_path) == f"tensor {name} holds {found} of {tensor.numel()} values"


def test_too_large_for_the_dtype(tmp_path: Path) -> None:
    tensor = TENSORS[K_PROJ].clone()
    tensor[0, :3] = 70_000.0
    write(tmp_path, LLAMA, TENSORS | {K_PROJ: tensor})
    load_checkpoint(tmp_path)
    assert refusal(tmp_path, dtype=torch.float16) == (
        f"tensor {K_PROJ} holds 3 of 128 values beyond 65504, the largest of torch.float16 "
        "(blocks.0.attention.qkv.weight)"
    )


@pytest.mark.parametrize(
    ("dtype", "shown"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")]
)
def test_quantized(tmp_path: Path, dtype: torch.dtype, shown: str) -> None:
    write(tmp_path, LLAMA, TENSORS | {K_PROJ: torch.ones(8, 16).to(dtype)})
    assert refusal(tmp_path) == (
        f"{K_PROJ} is stored as {shown}; weights may be F64, F32, F16, BF16"
    )


def test_tied_head_that_differs(tmp_path: Path) -> None:
    tensors = published_tensors(TIED)
    head = tensors[EMBEDDING].clone()
    head[3, :5] += 1
    write(tmp_path, TIED, tensors | {"lm_head.weight": head})
    assert refusal(tmp_path) == (
        "tie_word_embeddings is true, but tensor lm_head.weight differs from "
        f"{EMBEDDING} in 5 of 640 values"
    )
    write(tmp_path, TIED, tensors | {"lm_head.weight": head[:-1].clone()})
    assert refusal(tmp_path) == (
        "tie_word_embeddings is true, but tensor lm_head.weight has shape (39, 16) and "
        f"{EMBEDDING} (40, 16)"
    )


# Shards


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "a\0b", 7],
)
def test_index_leads_out_of_the_directory(tmp_path: Path, shard: object) -> None:
    write(tmp_path / "outside.safetensors", LLAMA, TENSORS)
    weight_map = write_shards(tmp_path / "in", LLAMA, TENSORS)
    write_index(tmp_path / "in", weight_map | {EMBEDDING: shard})
    assert refusal(tmp_path / "in") == (
        f"DIR/model.safetensors.index.json: {EMBEDDING} lies in {shard!r}, "
        "which is no file of this directory"
    )


def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, LLAMA, TENSORS)
    write_index(tmp_path, weight_map | {EMBEDDING: "model-3.safetensors"})
    assert refusal(tmp_path) == (
        f"DIR/model.safetensors.index.json: {EMBEDDING} lies in 'model-3.safetensors', "
        "which is missing"
    )


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, LLAMA, TENSORS)
    first, second = sorted(set(weight_map.values()))
    other = second if weight_map[EMBEDDING] == first else first
    write_index(tmp_path, weight_map | {EMBEDDING: other})
    assert (
        refusal(tmp_path) == f"DIR/{other}: the index puts {EMBEDDING} here, but the file lacks it"
    )
    write_index(tmp_path, {k: v for k, v in weight_map.items() if k != EMBEDDING})
    assert refusal(tmp_path) == (
        f"DIR/{weight_map[EMBEDDING]}: holds {EMBEDDING}, which the index does not put here"
    )


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    write_config(tmp_path, LLAMA)
    write_index(tmp_path, weight_map)
    assert refusal(tmp_path) == (
        f"DIR/model.safetensors.index.json: weight_map must be an object, got {weight_map!r}"
    )


@given(
    st.dictionaries(
        st.text(max_size=5), st.text(max_size=8) | st.integers() | st.none(), max_size=4
    )
)
@anywhere
def test_no_index_leads_out_of_the_directory(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "a").write_bytes(b"")
    write_index(tmp_path, weight_map)
    try:
        files = find_weights(tmp_path).files
    except CheckpointError:
        return
    assert all(file.parent == tmp_path for file in files)


# Pickles


class Bomb:
    """Unpickles by running a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_executes_nothing(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA)
    target = tmp_path / "executed"
    torch.save(TENSORS | {"bomb": Bomb(target)}, tmp_path / "pytorch_model.bin")
    assert refusal(tmp_path) == (
        "DIR/pytorch_model.bin: holds more than tensors and is not opened "
        f"(it asks for {os.name}.mkdir)"
    )
    assert not target.exists()


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, TENSORS)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never looked at")
    load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"model": TENSORS}, {1: torch.ones(2)}])
def test_a_pickle_of_something_else(tmp_path: Path, content: object) -> None:
    write_config(tmp_path, LLAMA)
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert refusal(tmp_path) == "DIR/pytorch_model.bin: must hold a mapping of names to tensors"


@given(data=st.data())
@settings(parent=anywhere, max_examples=60)
def test_a_pickle_truncated_anywhere(tmp_path: Path, data: st.DataObject) -> None:
    write_config(tmp_path, LLAMA)
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert refusal(tmp_path).startswith("DIR/pytorch_model.bin: ")


def test_an_old_pickle(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA)
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    assert refusal(tmp_path).startswith(
        "DIR/pytorch_model.bin: not a whole file written by torch.save in its zip format ("
    )


def test_quantized_pickle(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA)
    torch.save(
        TENSORS | {K_PROJ: torch.ones(8, 16, dtype=torch.int8)}, tmp_path / "pytorch_model.bin"
    )
    assert refusal(tmp_path) == f"{K_PROJ} is stored as int8; weights may be F64, F32, F16, BF16"


def test_reading_only_the_description_needs_no_weights(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA)
    info = read_checkpoint_info(tmp_path)
    assert (info.config.max_positions, info.tokens.eos_token_ids) == (64, (2,))
    assert info.family.model_type == "llama"
