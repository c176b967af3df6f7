"""Compiles and loads the C files beside it.

The library is built once per source, compiler flags and processor, in a few seconds, and
kept in the user's cache folder, unless one that fits was compiled ahead (prebuild.py). A machine
with neither that nor a C compiler serves through PyTorch (`EagerForward` in model/forward.py).
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

from model.kernels.processors import CPU_INFO, Target, features, targets
from model.kernels.structs import FORWARD_ARGUMENTS, PRODUCT_ARGUMENTS

SOURCES = tuple(
    Path(__file__).with_name(f"{name}.c")
    for name in ("forward", "linear", "attention", "glance", "team")
)
HEADERS = tuple(Path(__file__).with_name(f"{name}.h") for name in ("kernels", "team", "vectors"))
PREBUILT = Path(__file__).with_name("prebuilt")
HERE = ("-march=native",)
FLAGS = ("-O3", "-std=gnu11", "-pthread", "-fPIC", "-shared")
BUILD_LIMIT_S = 120
LANES = 16  # sizes that the kernels take are multiples of this


class NativeKernelError(RuntimeError):
    """The kernels cannot be built or loaded here; the message says why."""


@cache
def load() -> ctypes.CDLL:
    """The compiled kernels, built first if need be. Raises `NativeKernelError`."""
    path = _built_ahead()
    if path is None:
        path = _cache_folder() / f"kernels-{_fingerprint(HERE, _processor())}.so"
        if not path.exists():
            _build(path, HERE)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeKernelError(f"{path.name} does not load: {error}") from error
    for function, arguments in (
        (library.vitrine_forward, FORWARD_ARGUMENTS),
        (library.vitrine_product, PRODUCT_ARGUMENTS),
    ):
        function.argtypes, function.restype = list(arguments), None
    return library


def build_ahead(target: Target) -> Path:
    """Compile for a kind of processor, beside the sources; returns the library. Raises
    `NativeKernelError`."""
    path = _path_ahead(target)
    path.parent.mkdir(exist_ok=True)
    _build(path, target.flags)
    return path


def _built_ahead() -> Path | None:
    """The best library for this processor among those compiled ahead from these very sources."""
    here = features()
    fitting = (_path_ahead(target) for target in targets() if target.needs <= here)
    return next((path for path in fitting if path.exists()), None)


def _path_ahead(target: Target) -> Path:
    return PREBUILT / f"kernels-{target.name}-{_fingerprint(target.flags)}.so"


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise NativeKernelError("there is no C compiler (CC, cc, gcc, clang)")


def _fingerprint(march: tuple[str, ...], processor: str = "") -> str:
    """Source, flags and processor: what the compiled code depends on."""
    sources = "".join(path.read_text() for path in SOURCES + HEADERS)
    text = sources + " ".join((*march, *FLAGS)) + processor
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _processor() -> str:
    processor = platform.machine() + platform.processor()
    if CPU_INFO.exists():
        lines = CPU_INFO.read_text().splitlines()
        processor += "".join(x for x in lines if x.startswith(("model name", "flags")))[:8192]
    return processor


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


def _build(path: Path, march: tuple[str, ...]) -> None:
    """Compile beside the target and rename: another process never loads half a library."""
    beside = path.with_suffix(f".{os.getpid()}")
    command = [_compiler(), *march, *FLAGS, *map(str, SOURCES), "-o", str(beside), "-lm"]
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
