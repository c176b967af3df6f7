"""The tensors of a checkpoint, whatever files they lie in: memory-mapped, read one by one.

Nothing here executes what a file says. safetensors is data; a pickle is opened with
`weights_only=True`, which builds tensors and refuses everything else.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint_files import CheckpointError, WeightFiles, one_line

# What a weight may be stored as. Integers and 8-bit floats are quantized weights, which
# need scales that no family here knows.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_STORED_AS = {dtype: code for code, dtype in DTYPES.items()}


class TensorFile(Protocol):
    """One file of tensors; `read` gives a view of the mapped file where it can."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str) -> Tensor: ...


class _SafetensorsFile:
    def __init__(self, handle: Any) -> None:  # the stubs of safe_open have no types
        self._handle = handle

    def names(self) -> list[str]:
        return list(self._handle.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return str(self._handle.get_slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor


class _PickleFile:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        dtype = self._tensors[name].dtype
        return _STORED_AS.get(dtype, str(dtype).removeprefix("torch."))

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class Tensors:
    """All tensors of a checkpoint by name."""

    def __init__(self, where: dict[str, TensorFile]) -> None:
        self._where = where

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape; reads no weights."""
        return self._where[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The stored type. Raises `CheckpointError` for one that holds no plain weights."""
        code = self._where[name].dtype(name)
        if code not in DTYPES:
            raise CheckpointError(f"{name} is stored as {code}; weights may be {', '.join(DTYPES)}")
        return DTYPES[code]

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, as it is stored; a view of the mapped file."""
        return self._where[name].read(name)


@contextmanager
def open_tensors(weights: WeightFiles) -> Iterator[Tensors]:
    """Map all files of a checkpoint. Raises `CheckpointError` when one cannot be opened or
    does not hold what the index says."""
    with ExitStack() as stack:
        opened: dict[Path, TensorFile] = {}
        for path in weights.files:
            if weights.format == "safetensors":
                opened[path] = _open_safetensors(path, stack)
            else:
                opened[path] = _open_pickle(path)
        yield Tensors(_locate(weights, opened))


def _locate(weights: WeightFiles, opened: dict[Path, TensorFile]) -> dict[str, TensorFile]:
    if weights.where is None:
        (file,) = opened.values()
        return dict.fromkeys(file.names(), file)
    held = {path: frozenset(file.names()) for path, file in opened.items()}
    for name, path in weights.where.items():
        if name not in held[path]:
            raise CheckpointError(f"{path}: the index puts {name} here, but the file lacks it")
    for path, names in held.items():
        for name in sorted(names):
            if weights.where.get(name) != path:
                raise CheckpointError(f"{path}: holds {name}, which the index does not put here")
    return {name: opened[path] for name, path in weights.where.items()}


def _open_safetensors(path: Path, stack: ExitStack) -> TensorFile:
    try:
        return _SafetensorsFile(stack.enter_context(safe_open(path, framework="pt")))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file of {path.stat().st_size} bytes "
            f"({one_line(error)})"
        ) from error


def _open_pickle(path: Path) -> TensorFile:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors and is not opened ({_reason(error)})"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path}: not a whole file written by torch.save in its zip format ({one_line(error)})"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
    ):
        raise CheckpointError(f"{path}: must hold a mapping of names to tensors")
    return _PickleFile(loaded)


def _reason(error: pickle.UnpicklingError) -> str:
    """torch explains at length how to open the file all the same; what it refused is enough."""
    asked_for = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for {asked_for[1]}" if asked_for else "torch.load refuses it as weights"
