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
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu_kernels.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp", "-fPIC", "-shared")
BUILD_LIMIT_S = 120


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


@cache
def load() -> ctypes.CDLL:
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
    return library


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
