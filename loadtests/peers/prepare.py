"""`prepare`: checkpoints, the peers' virtual environment, builds and conversions.

Every step is skipped when its result is there, and one that fails costs its peer's column,
nothing else. Half a result never looks like a whole one: steps write beside the target and
rename.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loadtests.peers import checkpoints
from loadtests.peers.folder import Folder
from loadtests.peers.shapes import SHAPES, Shape
from loadtests.peers.work import PeerError

REPOSITORY = Path(__file__).parents[2]
PEERS = ("transformers", "llamacpp", "openvino")
LLAMACPP_PROGRAMS = ("llama-batched-bench", "llama-server")
GGUF_TYPES = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0"}
# The converters need torch, transformers and numpy; cmake and ninja build llama.cpp, whose
# package is built by scikit-build-core.
REQUIREMENTS = {
    "llamacpp": ["transformers", "sentencepiece", "cmake", "ninja", "scikit-build-core"],
    "openvino": ["openvino-genai", "optimum-intel"],
}
CMAKE_OPTIONS = (
    *("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON"),
    *("-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF"),
    *("-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"),
    "-DLLAMA_BUILD_APP=OFF",
)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to make: `make(target)` writes it; `needs` are steps it cannot do without."""

    name: str
    target: Path
    make: Callable[[Path], None]
    needs: tuple[str, ...] = ()


def prepare(folder: Folder, peers: tuple[str, ...], shapes: tuple[str, ...], jobs: int) -> int:
    """Make what is missing; the number of steps that failed."""
    folder.logs.mkdir(parents=True, exist_ok=True)
    failed: set[str] = set()
    for step in _steps(folder, peers, [SHAPES[name] for name in shapes], jobs):
        if step.target.exists():
            print(f"{step.name}: there", flush=True)
            folder.note(step.name, None)
            continue
        began = time.monotonic()
        print(f"{step.name} ...", flush=True)
        try:
            for need in step.needs:
                if need in failed:
                    raise PeerError(f"{need} failed")
            step.make(step.target)
        except (PeerError, OSError, ImportError) as error:
            failed.add(step.name)
            folder.note(step.name, f"{step.name}: {error}")
            print(f"{step.name}: FAILED: {error}", flush=True)
            continue
        folder.note(step.name, None)
        print(f"{step.name}: made in {time.monotonic() - began:.0f} s", flush=True)
    return len(failed)


def _steps(
    folder: Folder, peers: tuple[str, ...], shapes: list[Shape], jobs: int
) -> Iterator[Step]:
    for shape in shapes:
        yield Step(f"checkpoint {shape.name}", shape.checkpoint(folder.root), _Checkpoint(shape))
    tools = _Tools(folder, jobs)
    if {"llamacpp", "openvino"} & {*peers}:
        yield Step("venv", folder.python, tools.venv)
    if "llamacpp" in peers:
        yield Step("llamacpp tools", tools.mark("llamacpp"), tools.install, ("venv",))
        yield Step("llamacpp sources", folder.llamacpp_sources, tools.unpack, ("llamacpp tools",))
        for program in LLAMACPP_PROGRAMS:
            target = folder.llamacpp_program(program)
            yield Step(f"llamacpp {program}", target, tools.build, ("llamacpp sources",))
        for shape in shapes:
            for dtype in GGUF_TYPES:
                yield Step(
                    f"llamacpp {shape.name} {dtype}",
                    folder.gguf(shape.name, dtype),
                    _Gguf(tools, shape, GGUF_TYPES[dtype]),
                    ("llamacpp sources", f"checkpoint {shape.name}"),
                )
    if "openvino" in peers:
        yield Step("openvino tools", tools.mark("openvino"), tools.install, ("venv",))
        for shape in shapes:
            for kind in ("fp32", "int8"):
                yield Step(
                    f"openvino {shape.name} {kind}",
                    folder.openvino(shape.name, kind),
                    _OpenVino(tools, shape, kind),
                    ("openvino tools", f"checkpoint {shape.name}"),
                )


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    shape: Shape

    def __call__(self, target: Path) -> None:
        beside = _beside(target)
        checkpoints.make(self.shape, beside)
        beside.rename(target)


@dataclass(frozen=True, slots=True)
class _Tools:
    """The peers' virtual environment and what is run in it."""

    folder: Folder
    jobs: int

    def mark(self, peer: str) -> Path:
        """The file that says that a peer's packages are installed."""
        return self.folder.root / "venv" / f"{peer}.installed"

    def venv(self, target: Path) -> None:
        self.run("venv", sys.executable, "-m", "venv", str(self.folder.root / "venv"))

    def install(self, target: Path) -> None:
        # Ours exactly: a newer torch may bring gigabytes for devices that are not here.
        torch = importlib.metadata.version("torch").partition("+")[0]
        pin = self.folder.root / "constraints.txt"
        pin.write_text(f"torch=={torch}\n")
        packages = REQUIREMENTS[target.stem]
        self.pip("install", "-c", str(pin), f"torch=={torch}", "numpy", *packages)
        # It may come with the converters, made for another build of torch, and is not needed;
        # where it cannot be imported, neither can transformers.
        self.pip("uninstall", "-y", "torchvision")
        target.touch()

    def pip(self, *arguments: str) -> None:
        self.run(f"pip-{arguments[0]}", self.folder.python, "-m", "pip", *arguments)

    def unpack(self, target: Path) -> None:
        """The source package of llama-cpp-python, which carries llama.cpp."""
        beside = _beside(target)
        flags = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation")
        self.pip("download", *flags, "-d", str(beside), "llama-cpp-python")
        (archive,) = beside.glob("*.tar.gz")
        shutil.unpack_archive(archive, beside, filter="data")
        beside.rename(target)

    def build(self, target: Path) -> None:
        build = self.folder.llamacpp_build
        sources = self.folder.llamacpp_vendored
        self.run("cmake", "cmake", "-S", sources, "-B", build, *CMAKE_OPTIONS)
        jobs = str(self.jobs)
        self.run("build", "cmake", "--build", build, "-j", jobs, "--target", target.name)

    def run(self, log_name: str, *command: str | Path) -> None:
        """Run a command, its output into a log; `PeerError` with its last line if it fails."""
        environment = os.environ | {
            "PATH": f"{self.folder.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "HF_HUB_OFFLINE": "1",
        }
        log = self.folder.logs / f"{log_name}.txt"
        with log.open("wb") as output:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=REPOSITORY,
                check=False,
            ).returncode
        if status:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise PeerError(f"{lines[-1] if lines else f'status {status}'} (see {log})")


@dataclass(frozen=True, slots=True)
class _Gguf:
    tools: _Tools
    shape: Shape
    kind: str

    def __call__(self, target: Path) -> None:
        folder = self.tools.folder
        beside = _beside(target)
        self.tools.run(
            f"gguf-{self.shape.name}-{self.kind}",
            *(folder.python, "-m", "loadtests.peers.to_gguf", folder.llamacpp_vendored),
            *(self.shape.checkpoint(folder.root), self.kind, beside),
        )
        beside.rename(target)


@dataclass(frozen=True, slots=True)
class _OpenVino:
    """Exported in float32 (the precision to compute in is chosen when the model is loaded) or with
    int8 weights."""

    tools: _Tools
    shape: Shape
    kind: str

    def __call__(self, target: Path) -> None:
        folder = self.tools.folder
        beside = _beside(target)
        self.tools.run(
            f"openvino-{self.shape.name}-{self.kind}",
            *(folder.python.parent / "optimum-cli", "export", "openvino"),
            *("-m", self.shape.checkpoint(folder.root)),
            *("--task", "text-generation-with-past", "--weight-format", self.kind, beside),
        )
        beside.rename(target)


def _beside(target: Path) -> Path:
    """Where to write `target` until it is whole; empty."""
    beside = target.with_name(f"{target.stem}.part{target.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if beside.is_dir():
        shutil.rmtree(beside)
    beside.unlink(missing_ok=True)
    return beside
