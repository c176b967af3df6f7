"""What each head of a model does: the probes of model/explain/probes.py over texts, as figures, a
table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.progress import track
from rich.table import Table
from torch import Tensor

from model.checkpoint import Checkpoint
from model.explain.probes import (
    FIRST,
    INDUCTION,
    PREVIOUS,
    RIGHT,
    SAME,
    WRONG,
    HeadScores,
    Tally,
    induction_probe,
    pronoun_probes,
    text_probe,
)
from model.tokenizer import Tokenizer

LEADERS = 5  # heads that the table names for each score
MEANINGS = {
    PREVIOUS: "on the token before",
    FIRST: "on the first token",
    SAME: "on the same token, earlier",
    INDUCTION: "on what followed last time",
    RIGHT: "from a pronoun on the right noun",
    WRONG: "from a pronoun on the wrong noun",
}


class PictureError(Exception):
    """The picture cannot be drawn here; the message says what is missing."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadReport:
    """Every head's scores."""

    num_texts: int
    num_tokens: int  # of the texts
    scores: dict[str, HeadScores]
    # In how many of the sentence fours the right nouns got more than the wrong ones.
    fours_won: Float[Tensor, "num_layers num_heads"]
    num_fours: int

    @property
    def pronoun(self) -> Float[Tensor, "num_layers num_heads"]:
        """Attention on the right noun, less that on the wrong one; by chance 0."""
        return self.scores[RIGHT].heads - self.scores[WRONG].heads

    def as_json(self) -> dict[str, Any]:
        """Every figure, [layer][head]."""
        return {
            "num_texts": self.num_texts,
            "num_tokens": self.num_tokens,
            "scores": {
                name: {
                    "meaning": MEANINGS[name],
                    "num_queries": score.num_queries,
                    "chance": score.chance,
                    "heads": score.heads.tolist(),
                }
                for name, score in self.scores.items()
            },
            "pronoun": {
                "meaning": "right noun - wrong noun",
                "chance": 0.0,
                "heads": self.pronoun.tolist(),
                "fours_won": self.fours_won.tolist(),
                "num_fours": self.num_fours,
            },
        }


def measure_heads(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_tokens: int = 256,
    num_repetitions: int = 20,
    repeated_tokens: int = 48,
    seed: int = 0,
    progress: bool = False,
) -> HeadReport:
    """Put every head to every test: the beginnings of `texts`, `num_repetitions` random sequences
    of `repeated_tokens` tokens and their repetition, and sentences with pronouns."""
    limit = checkpoint.config.max_positions
    bos = checkpoint.bos_token_id
    tally = Tally(checkpoint.model)

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As the model saw texts begin: after BOS, if it has one."""
        ids, offsets = tokenizer.encode_with_offsets(text)
        if bos is not None and ids[:1] != [bos]:
            ids, offsets = [bos, *ids], [(0, 0), *offsets]
        return ids, offsets

    num_tokens = 0
    for text in track(texts, "texts", disable=not progress, transient=True):
        ids = encode(text)[0][: min(max_tokens, limit)]
        num_tokens += len(ids)
        tally.add(text_probe(ids))

    vocabulary = [
        id_
        for id_ in range(min(tokenizer.vocab_size, checkpoint.config.vocab_size))
        if id_ not in tokenizer.special_ids and id_ not in checkpoint.eos_token_ids
    ]
    start = [] if bos is None else [bos]
    length = min(repeated_tokens, (limit - 1) // 2, len(vocabulary))
    for number in track(range(num_repetitions), "repeats", disable=not progress, transient=True):
        tally.add(induction_probe(start, vocabulary, length, seed + number))

    fours = list(pronoun_probes(encode))
    won = torch.zeros(checkpoint.config.num_layers, checkpoint.config.num_heads)
    for four in track(fours, "pronouns", disable=not progress, transient=True):
        found = [tally.add(probe) for probe in four]
        lead = torch.stack([scores[RIGHT] - scores[WRONG] for scores in found])
        won += lead.sum(dim=0) > 0
    return HeadReport(len(texts), num_tokens, tally.scores(), won / len(fours), len(fours))


def heads_table(report: HeadReport, title: str) -> Table:
    """Each score's chance, its mean over all heads, and the heads that lead."""
    table = Table(title=title, title_justify="left")
    table.add_column("a head's attention, mean over queries")
    for heading in ("chance", "all heads"):
        table.add_column(heading, justify="right")
    table.add_column("strongest: layer.head share")
    for name, score in report.scores.items():
        leaders = _leaders(score.heads)
        table.add_row(
            MEANINGS[name],
            f"{score.chance:.3f}",
            f"{float(score.heads.mean()):.3f}",
            "  ".join(f"{at} {value:.2f}" for at, value, _ in leaders),
        )
    table.add_row(
        "right noun less wrong noun\n(share of sentence fours that it wins)",
        "0\n(50%)",
        f"{float(report.pronoun.mean()):+.3f}\n({float(report.fours_won.mean()):.0%})",
        "  ".join(
            f"{at} {value:+.2f} ({report.fours_won.flatten()[i]:.0%})"
            for at, value, i in _leaders(report.pronoun)
        ),
    )
    return table


def _leaders(heads: Float[Tensor, "num_layers num_heads"]) -> list[tuple[str, float, int]]:
    """(layer.head, value, place in the flattened table) of the heads with the most."""
    top = heads.flatten().topk(min(LEADERS, heads.numel()))
    return [
        (f"{place // heads.shape[1]}.{place % heads.shape[1]}", value, place)
        for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def draw_heads(report: HeadReport, picture: Path, title: str) -> None:
    """A PNG or SVG, by the file's name: one square a head, one panel a score. Raises
    `PictureError` without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise PictureError("a picture needs matplotlib: pip install 'vitrine[train]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (MEANINGS[name], report.scores[name].heads, f"chance {report.scores[name].chance:.3f}", 0.0)
        for name in (PREVIOUS, FIRST, SAME, INDUCTION, RIGHT)
    ]
    panels.append(("right noun less wrong noun", report.pronoun, "chance 0", -1.0))
    figure, grid = plt.subplots(2, 3, figsize=(11, 6.5), layout="constrained")
    for axes, (name, heads, chance, low) in zip(grid.flat, panels, strict=True):
        colours = "RdBu" if low < 0 else "viridis"
        image = axes.imshow(heads.numpy(), vmin=low, vmax=1.0, cmap=colours, aspect="auto")
        axes.set_title(f"{name}\n({chance})", fontsize=10)
        axes.set(xlabel="head", ylabel="layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes)
    figure.suptitle(title)
    # Without a date, the same figures give the same file.
    figure.savefig(picture, dpi=110, metadata={"Date": None} if picture.suffix == ".svg" else None)
    plt.close(figure)
