"""What a figure is to the page, and what all figures draw from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from loadtests.report.computed import needs_of, parameters_of
from loadtests.report.lanes import GPU_DTYPE, Lane
from loadtests.report.records import Run
from model.families.published import PUBLISHED
from service.engine.traffic import Traffic

LARGE = "qwen3-8b"  # what people mean by a language model today
NAMES = {"stories": "bundled, 5 M", "gpt2": "gpt2, 124 M", "qwen3-0.6b": "Qwen3 0.6 B"}
NAMES |= {LARGE: "Qwen3 8 B", "smollm-135m": "SmolLM 135 M"}


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure with its words: a heading, the sentence one takes away, and why it is so."""

    key: str
    title: str
    claim: str
    why: tuple[str, ...]
    figure: Figure
    alt: str


@dataclass(frozen=True, slots=True)
class Material:
    """What there is to draw."""

    runs: tuple[Run, ...]
    lanes: tuple[Lane, ...]

    @property
    def served(self) -> list[str]:
        """Models that were served somewhere, small ones first."""
        names = {run.model: run for run in self.runs if run.served is not None}
        return sorted(names, key=lambda name: parameters_of(names[name].config))

    @property
    def models(self) -> list[str]:
        """Every model that was measured, and the large one, small ones first."""
        names = {run.model for run in self.runs} | {LARGE}
        return sorted(names, key=lambda name: parameters_of(self.config(name)))

    def config(self, model: str) -> dict[str, object]:
        """config.json of a model."""
        for run in self.runs:
            if run.model == model:
                return run.config
        return PUBLISHED[model]

    def needs(self, model: str) -> Traffic:
        """In bfloat16, as all lanes are compared in it."""
        return needs_of(self.config(model), GPU_DTYPE)

    def own(self, lanes: Sequence[Lane] | None = None) -> list[Lane]:
        """Lanes with measurements."""
        return [lane for lane in lanes or self.lanes if lane.is_measured]


def name_of(model: str) -> str:
    """As figures call it."""
    return NAMES.get(model, model)
