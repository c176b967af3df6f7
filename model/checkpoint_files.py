"""The files of a checkpoint directory, read and checked without torch.

`model/checkpoint.py` loads the weights these files hold; the API process, which never
imports torch, asks here for the context length and the end-of-text ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.config import ConfigError, ModelConfig
from model.families import Family, family_of, read_config
from model.families.fields import show

BUNDLED = "stories"
MAX_JSON_BYTES = 64 * 2**20  # a shard index of the largest published models has a few MB

WeightFormat = Literal["safetensors", "pickle"]
# Looked for in this order: safetensors before pickles, one file before shards.
WEIGHT_FILES: tuple[tuple[str, WeightFormat, bool], ...] = (
    ("model.safetensors", "safetensors", False),
    ("model.safetensors.index.json", "safetensors", True),
    ("pytorch_model.bin", "pickle", False),
    ("pytorch_model.bin.index.json", "pickle", True),
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; one line saying which file, tensor or field, and why."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids with a meaning of their own; the ids that end a text may be several."""

    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files that hold the tensors. `where` maps a tensor to its file when an index says
    so; without an index there is one file."""

    format: WeightFormat
    files: tuple[Path, ...]
    where: dict[str, Path] | None


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint says of itself, without its weights."""

    directory: Path
    config: ModelConfig
    family: Family
    tokens: SpecialTokens


def bundled_checkpoint() -> Path:
    """The checkpoint that comes with the package."""
    return Path(__file__).parent / "checkpoints" / BUNDLED


def read_checkpoint_info(directory: Path) -> CheckpointInfo:
    """config.json and generation_config.json of a directory.

    Raises `CheckpointError` when a file is missing or not JSON, when the architecture or
    anything else the config asks for is not supported, and when two numbers disagree.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: no config.json in it")
    return _info(directory, path)


def read_config_file(path: Path) -> ModelConfig:
    """The architecture a config.json describes, wherever it lies. Raises `CheckpointError`."""
    return _info(path.parent, path).config


def _info(directory: Path, path: Path) -> CheckpointInfo:
    raw = read_json(path)
    try:
        family, config = family_of(raw), read_config(raw)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return CheckpointInfo(directory, config, family, _special_tokens(path, raw, config))


def read_json(path: Path) -> dict[str, object]:
    """A file holding one JSON object. Raises `CheckpointError`."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, at most {MAX_JSON_BYTES} are read")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    # RecursionError: nested a few thousand deep. UnicodeDecodeError and JSONDecodeError
    # are ValueErrors; so is a number with too many digits.
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not valid JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {show(value)}")
    return value


def one_line(error: BaseException) -> str:
    """What an exception of another library says, on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _special_tokens(
    config_path: Path, raw: dict[str, object], config: ModelConfig
) -> SpecialTokens:
    """generation_config.json first, then config.json: the former is what the publisher
    generates with, and lists every id that ends a turn."""
    sources = [(config_path, raw)]
    generation_path = config_path.parent / "generation_config.json"
    if generation_path.is_file():
        sources.insert(0, (generation_path, read_json(generation_path)))

    def first(name: str, *, several: bool) -> tuple[int, ...]:
        for path, values in sources:
            if values.get(name) is not None:
                return _token_ids(path, name, values[name], config.vocab_size, several=several)
        return ()

    bos = first("bos_token_id", several=False)
    return SpecialTokens(first("eos_token_id", several=True), bos[0] if bos else None)


def _token_ids(
    path: Path, name: str, value: object, vocab_size: int, *, several: bool
) -> tuple[int, ...]:
    ids = value if isinstance(value, list) and several else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            kind = "token ids" if several else "a token id"
            raise CheckpointError(f"{path}: {name} must be {kind}, got {show(value)}")
        if not 0 <= token_id < vocab_size:
            raise CheckpointError(
                f"{path}: {name} {show(token_id)} is no token of a vocabulary of {vocab_size}"
            )
    return tuple(dict.fromkeys(ids))


def find_weights(directory: Path) -> WeightFiles:
    """The weight files of a directory, in the order safetensors, pickle; each as one file or
    as shards with an index.

    Raises `CheckpointError` when there are none, when the index is malformed, and when it
    names a file that is missing or lies outside of the directory.
    """
    for name, weight_format, is_index in WEIGHT_FILES:
        path = directory / name
        if path.is_file():
            if not is_index:
                return WeightFiles(weight_format, (path,), None)
            where = _read_index(path)
            return WeightFiles(weight_format, tuple(sorted(set(where.values()))), where)
    names = ", ".join(name for name, _, _ in WEIGHT_FILES)
    raise CheckpointError(f"{directory}: no weights in it (looked for {names})")


def _read_index(path: Path) -> dict[str, Path]:
    entries = read_json(path).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{path}: weight_map must be an object, got {show(entries)}")
    where: dict[str, Path] = {}
    missing: dict[str, bool] = {}  # asked once a shard, not once a tensor
    for tensor, shard in entries.items():
        # A plain name only: anything with a separator could lead out of the directory. The
        # file itself may be a link, as in the cache of huggingface_hub.
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise CheckpointError(
                f"{path}: {tensor} lies in {show(shard)}, which is no file of this directory"
            )
        shard_path = path.parent / shard
        if missing.setdefault(shard, not shard_path.is_file()):
            raise CheckpointError(f"{path}: {tensor} lies in {show(shard)}, which is missing")
        where[tensor] = shard_path
    return where


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
