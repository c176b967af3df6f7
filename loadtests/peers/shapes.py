"""The shapes that are compared: published ones with random weights, and the bundled model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from model.families.published import PUBLISHED

BUNDLED = Path(__file__).parents[2] / "model" / "checkpoints" / "stories"


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to compare on. `bundled` is None for random weights."""

    name: str
    config: dict[str, object]
    bundled: Path | None = None

    @property
    def vocab_size(self) -> int:
        return int(str(self.config["vocab_size"]))

    @property
    def context_length(self) -> int:
        config = self.config
        return int(str(config.get("max_position_embeddings") or config["n_positions"]))

    def checkpoint(self, folder: Path) -> Path:
        """Where its checkpoint lies, once prepared."""
        return folder / "checkpoints" / self.name


def _shapes() -> dict[str, Shape]:
    names = {"gpt2": "gpt2", "smollm135m": "smollm-135m", "stories15m": "stories15m"}
    shapes = {short: Shape(short, PUBLISHED[name]) for short, name in names.items()}
    config = BUNDLED / "config.json"
    if config.exists():
        shapes["bundled"] = Shape("bundled", json.loads(config.read_text()), BUNDLED)
    return shapes


SHAPES = _shapes()
