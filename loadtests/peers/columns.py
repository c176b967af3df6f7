"""The contenders by name: which module, which interpreter, and what each needs to be there."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.peers.folder import Folder
from loadtests.peers.work import What, Work
from model.threads import SPIN_COUNT

OURS = "vitrine"
MODULES = "loadtests.peers.contenders"


@dataclass(frozen=True, slots=True)
class Column:
    """One contender in the table. `needs` lists (path, step of `prepare` that makes it)."""

    name: str
    module: str
    whats: tuple[What, ...] = ("decode", "prefill")
    in_venv: bool = False
    package: str | None = None  # of the running interpreter
    program: str | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, folder: Folder, work: Work) -> list[str]:
        """The process that measures `work`."""
        python = str(folder.python) if self.in_venv else sys.executable
        return [python, "-m", f"{MODULES}.{self.module}", work.to_json()]

    def missing(self, folder: Folder, work: Work) -> str | None:
        """Why this column cannot be had here, or None."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.package == "transformers" and work.dtype == "int8":
            return "transformers computes no int8 weights on a CPU"
        for path, step in self._needed(folder, work):
            if not path.exists():
                return folder.reason(step) or f"{step}: not prepared"
        return None

    def _needed(self, folder: Folder, work: Work) -> list[tuple[Path, str]]:
        needed = [(Path(work.checkpoint), f"checkpoint {work.shape}")]
        if self.in_venv:
            kind = "int8" if work.dtype == "int8" else "fp32"
            needed += [
                (folder.python, "venv"),
                (folder.openvino(work.shape, work.dtype), f"openvino {work.shape} {kind}"),
            ]
        if self.program:
            needed += [
                (folder.llamacpp_program(self.program), f"llamacpp {self.program}"),
                (folder.gguf(work.shape, work.dtype), f"llamacpp {work.shape} {work.dtype}"),
            ]
        return needed


COLUMNS = (
    # `vitrine serve` starts its engine with this variable.
    Column(OURS, "vitrine", environment={"GOMP_SPINCOUNT": SPIN_COUNT}),
    Column("llama.cpp", "llamacpp_bench", program="llama-batched-bench"),
    Column("openvino", "openvino_genai", in_venv=True),
    Column("transformers", "transformers_generate", package="transformers"),
    Column("transformers-cb", "transformers_batching", package="transformers"),
    Column(OURS, "vitrine_http", whats=("http",)),
    Column("llama-server", "llamacpp_http", whats=("http",), program="llama-server"),
)


def columns(what: What, names: tuple[str, ...]) -> list[Column]:
    """The contenders for this kind of work; with `names`, only those and Vitrine."""
    return [
        column
        for column in COLUMNS
        if what in column.whats and (not names or column.name in (OURS, *names))
    ]
