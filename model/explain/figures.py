"""The figures of docs/from-the-equation-to-the-code.md, from the bundled model.

    python -m model.explain.figures docs/figures

One query of one head, step by step; attention maps of three heads; the logit lens. Needs
matplotlib (the extra [train]); the same figures give the same files.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

from model.checkpoint import Checkpoint, load_checkpoint
from model.checkpoint_files import bundled_checkpoint
from model.explain.record import complete, record
from model.explain.recording import Recording
from model.explain.views import Candidate, head_steps, lens
from model.tokenizer import Tokenizer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SENTENCE = "The boy was with the girl, and she was very happy"
STEPS = (1, 1)  # layer, head: looks at nouns
QUERY = " she"
MAPS = ((1, 1), (2, 0), (4, 2))
DPI = 110


def main() -> None:
    """Draw all of them into a folder."""
    parser = argparse.ArgumentParser(prog="python -m model.explain.figures", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    checkpoint = load_checkpoint(bundled_checkpoint(), dtype=torch.float32)
    tokenizer = Tokenizer.from_directory(checkpoint.directory)
    if checkpoint.bos_token_id is None:
        raise SystemExit("the bundled model has a token that begins a text; this one has none")
    ids = [checkpoint.bos_token_id, *tokenizer.encode(SENTENCE)]
    texts = ["(start)", *(tokenizer.token_text(id_) for id_ in ids[1:])]
    recording = complete(record(checkpoint.model, torch.tensor(ids)))
    draw_steps(checkpoint, recording, texts, folder / "one-head.png")
    draw_maps(recording, texts, folder / "attention.png")
    positions = range(len(ids) - 6, len(ids))
    seen = complete(lens(checkpoint.model, recording, positions, 1))
    draw_lens(seen, texts[-6:], tokenizer, folder / "lens.png")


def draw_steps(
    checkpoint: Checkpoint, recording: Recording, texts: Sequence[str], picture: Path
) -> None:
    """q . k, then / sqrt(d), then softmax, of one query."""
    layer, head = STEPS
    query = list(texts).index(QUERY)
    steps = head_steps(checkpoint.config, recording, layer=layer, head=head, query=query)
    panels = (
        ("q . k", steps.scores),
        (f"q . k / sqrt({steps.head_dim})", steps.scaled),
        ("softmax: weights, sum 1", steps.weights),
    )
    figure, grid = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    for axes, (title, values) in zip(grid, panels, strict=True):
        axes.barh(range(len(values)), values)
        axes.axvline(0, color="black", lw=0.6)
        axes.set_title(title, fontsize=10)
    _name(grid[0].set_yticks, texts[: query + 1])
    grid[0].invert_yaxis()
    figure.suptitle(f"head {layer}.{head}, the query of '{QUERY.strip()}' asks every key before it")
    _save(figure, picture)


def draw_maps(recording: Recording, texts: Sequence[str], picture: Path) -> None:
    """Attention weights, a row a query."""
    figure, grid = plt.subplots(1, len(MAPS), figsize=(12, 4), layout="constrained")
    for axes, (layer, head) in zip(grid, MAPS, strict=True):
        image = axes.imshow(recording.weights(layer)[head].numpy(), vmin=0, vmax=1, cmap="Blues")
        axes.set_title(f"layer {layer}, head {head}", fontsize=10)
        _name(axes.set_xticks, texts, rotation=90)
        _name(axes.set_yticks, texts)
        axes.set(xlabel="key", ylabel="query")
    figure.colorbar(image, ax=grid, shrink=0.8)
    _save(figure, picture)


def draw_lens(
    seen: list[list[list[Candidate]]], texts: Sequence[str], tokenizer: Tokenizer, picture: Path
) -> None:
    """Each layer's likeliest next token; the colour is its probability."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    best = [[candidates[0] for candidates in layer] for layer in seen]
    shares = [[math.exp(candidate.logprob) for candidate in layer] for layer in best]
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Greens", aspect="auto")
    for layer, row in enumerate(best):
        for place, candidate in enumerate(row):
            text = tokenizer.token_text(candidate.token_id).strip() or "(space)"
            colour = "white" if shares[layer][place] > 0.6 else "black"
            axes.text(place, layer, text, ha="center", va="center", fontsize=9, color=colour)
    _name(axes.set_xticks, texts)
    _name(axes.set_yticks, ["embedding", *(f"after layer {i}" for i in range(len(seen) - 1))])
    axes.set_xlabel("position; each cell is the guess of what comes after it")
    figure.colorbar(image, label="probability")
    _save(figure, picture)


def _name(set_ticks: Any, texts: Sequence[str], rotation: int = 0) -> None:
    set_ticks(range(len(texts)), [text.strip() for text in texts], rotation=rotation, fontsize=8)


def _save(figure: Any, picture: Path) -> None:
    figure.savefig(picture, dpi=DPI)
    plt.close(figure)


if __name__ == "__main__":
    main()
