"""Held-out loss of a checkpoint, per token and per byte.

    python -m model.training.evaluate [--model DIR] [--data FILE]

Bits per byte = (sum of -log2 p over all tokens, end-of-text included) / (bytes of the
stories, separators not counted). It does not depend on the vocabulary, so models with
different tokenizers can be compared.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from tokenizers import Tokenizer

from model.backends.dense import DenseAttention
from model.training.data import HELD_OUT_FILE, encode_stories, read_stories
from model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Loss in nats a token; the rest follows from it."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


@torch.inference_mode()
def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    stories: list[str],
    *,
    context: int,
    progress: bool = False,
) -> HeldOut:
    """Every token of every story, each story on its own after an end-of-text.

    A story longer than `context` is cut into windows of that many tokens, the later ones
    starting without what came before (which makes the figure slightly worse, never better).
    """
    nats, num_tokens = 0.0, 0
    encoded = encode_stories(tokenizer, stories)
    for ids in track(encoded, "held-out", disable=not progress, transient=True):
        for start in range(0, len(ids) - 1, context):
            window = torch.tensor(ids[start : start + context + 1])
            inputs, targets = window[:-1], window[1:]
            hidden = model(inputs, torch.arange(len(inputs)), DenseAttention(model.config, 1))
            nats += F.cross_entropy(model.logits(hidden), targets, reduction="sum").item()
            num_tokens += len(targets)
    return HeldOut(nats, num_tokens, sum(len(story.encode()) for story in stories))


def main() -> None:
    """Print the held-out figures of a checkpoint."""
    # Here, because a checkpoint is made before one can be loaded.
    from model.checkpoint import bundled_checkpoint, load_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, default=bundled_checkpoint())
    parser.add_argument("--data", type=Path, default=HELD_OUT_FILE)
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.model, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    result = evaluate(
        checkpoint.model,
        tokenizer,
        read_stories(arguments.data),
        context=checkpoint.config.max_positions,
        progress=True,
    )
    print(f"tokens          {result.num_tokens:,}")
    print(f"bytes           {result.num_bytes:,}")
    print(f"loss            {result.loss:.4f} nats per token")
    print(f"perplexity      {result.perplexity:.3f} per token")
    print(f"bits per byte   {result.bits_per_byte:.4f}")


if __name__ == "__main__":
    main()
