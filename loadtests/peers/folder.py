"""Where the peers' things lie: one folder outside the repository, nothing of it committed."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path


def default_root() -> Path:
    """$PEERS_DIR, or a folder in the temporary directory."""
    named = os.environ.get("PEERS_DIR")
    return Path(named) if named else Path(tempfile.gettempdir()) / "vitrine-peers"


@dataclass(frozen=True, slots=True)
class Folder:
    """Paths under the peers' folder. `prepare` fills them, contenders read them."""

    root: Path

    @property
    def python(self) -> Path:
        """Interpreter of the peers' virtual environment."""
        return self.root / "venv" / "bin" / "python"

    @property
    def logs(self) -> Path:
        return self.root / "log"

    @property
    def llamacpp_sources(self) -> Path:
        """The unpacked source package of llama-cpp-python."""
        return self.root / "sdist"

    @property
    def llamacpp_vendored(self) -> Path:
        """llama.cpp inside it."""
        found = sorted(self.llamacpp_sources.glob("*/vendor/llama.cpp"))
        return found[0] if found else self.llamacpp_sources

    @property
    def llamacpp_build(self) -> Path:
        return self.root / "llamacpp"

    def llamacpp_program(self, name: str) -> Path:
        return self.llamacpp_build / "bin" / name

    def gguf(self, shape: str, dtype: str) -> Path:
        return self.root / "gguf" / f"{shape}-{dtype}.gguf"

    def openvino(self, shape: str, dtype: str) -> Path:
        return self.root / "openvino" / (f"{shape}-int8" if dtype == "int8" else shape)

    def reason(self, step: str) -> str | None:
        """Why a step of `prepare` failed, if it did."""
        return self._failures().get(step)

    def note(self, step: str, reason: str | None) -> None:
        """Remember that a step failed (or, with None, that it no longer does)."""
        failures = self._failures()
        failures.pop(step, None)
        if reason is not None:
            failures[step] = reason
        self._failure_file.write_text(json.dumps(failures, indent=2))

    @property
    def _failure_file(self) -> Path:
        return self.root / "failures.json"

    def _failures(self) -> dict[str, str]:
        if not self._failure_file.exists():
            return {}
        failures: dict[str, str] = json.loads(self._failure_file.read_text())
        return failures
