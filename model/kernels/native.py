"""Compiles and loads model/kernels/cpu_kernels.c.

The library is built once per source, compiler flags and processor, in about a second, and
kept in the user's cache folder. A machine without a C compiler serves through the PyTorch
twin (model/backends/cpu.py) instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu_kernels.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp", "-fPIC", "-shared")
BUILD_LIMIT_S = 120
LANES = 16  # sizes that the kernels take are multiples of this


class NativeKernelError(RuntimeError):
    """The kernels cannot be built or loaded here; the message says why."""


class Shape(ctypes.Structure):
    """`Shape` of cpu_kernels.c, field by field."""

    _fields_ = (
        ("num_seqs", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("max_blocks", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
        ("qkv_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """The compiled kernels, called on tensors. float32 or bfloat16, contiguous, on the CPU."""

    library: ctypes.CDLL

    def rms_norm(
        self, x: Float[Tensor, "rows size"], weight: Float[Tensor, " size"], eps: float
    ) -> Float[Tensor, "rows size"]:
        """x / sqrt(mean(x^2) + eps) * weight; size must be a multiple of LANES."""
        out = torch.empty_like(x)
        self.library.vitrine_rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            x.shape[1],
            eps,
            x.dtype == torch.bfloat16,
        )
        return out

    def layer_norm(
        self,
        x: Float[Tensor, "rows size"],
        weight: Float[Tensor, " size"],
        bias: Float[Tensor, " size"],
        eps: float,
    ) -> Float[Tensor, "rows size"]:
        """(x - mean) / sqrt(variance + eps) * weight + bias; size must be a multiple of LANES."""
        out = torch.empty_like(x)
        self.library.vitrine_layer_norm(
            x.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            x.shape[1],
            eps,
            x.dtype == torch.bfloat16,
        )
        return out

    def silu_mul(self, gate_up: Float[Tensor, "rows two_sizes"]) -> Float[Tensor, "rows size"]:
        """SiLU(gate) * up of [gate | up]; size must be a multiple of LANES."""
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, size, dtype=gate_up.dtype)
        self.library.vitrine_silu_mul(
            gate_up.data_ptr(), out.data_ptr(), rows, size, gate_up.dtype == torch.bfloat16
        )
        return out


@cache
def load() -> NativeKernels:
    """The compiled kernels, built first if need be. Raises `NativeKernelError`."""
    path = _cache_folder() / f"cpu_kernels-{_fingerprint()}.so"
    if not path.exists():
        _build(path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeKernelError(f"{path.name} does not load: {error}") from error
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.vitrine_attention.argtypes = [
        ctypes.POINTER(Shape),
        *(pointer,) * 4,
        count,
        pointer,
        count,
        *(pointer,) * 4,
    ]
    library.vitrine_attention.restype = None
    library.vitrine_rms_norm.argtypes = [*(pointer,) * 3, count, count, ctypes.c_float, count]
    library.vitrine_rms_norm.restype = None
    library.vitrine_layer_norm.argtypes = [*(pointer,) * 4, count, count, ctypes.c_float, count]
    library.vitrine_layer_norm.restype = None
    library.vitrine_silu_mul.argtypes = [pointer, pointer, count, count, count]
    library.vitrine_silu_mul.restype = None
    return NativeKernels(library)


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise NativeKernelError("there is no C compiler (CC, cc, gcc, clang)")


def _fingerprint() -> str:
    """Source, flags and processor: what the compiled code depends on."""
    processor = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        processor += "".join(x for x in lines if x.startswith(("model name", "flags")))[:8192]
    text = SOURCE.read_text() + " ".join(FLAGS) + processor
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    """A folder that only this user can write: code is loaded from it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "vitrine"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="vitrine-kernels-"))
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or not os.access(folder, os.W_OK):
        return Path(tempfile.mkdtemp(prefix="vitrine-kernels-"))
    return folder


def _build(path: Path) -> None:
    """Compile beside the target and rename: another process never loads half a library."""
    beside = path.with_suffix(f".{os.getpid()}")
    command = [_compiler(), *FLAGS, str(SOURCE), "-o", str(beside), "-lm"]
    try:
        done = subprocess.run(  # noqa: S603 - our own source, the user's compiler
            command, capture_output=True, text=True, timeout=BUILD_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeKernelError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        first = done.stderr.strip().splitlines()[:1]
        raise NativeKernelError(f"{command[0]} failed: {' '.join(first)}")
    beside.replace(path)
