"""Make the bundled checkpoint: a tokenizer, a Llama-shaped model, a model directory.

    python -m model.training --out runs/stories

About an hour and a half on two CPU cores. Interrupt it and run it again: it resumes.
The result in OUT/checkpoint has the Hugging Face layout, so any tool can read it.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from model.threads import set_wait_policy

set_wait_policy(os.environ)  # before torch is imported

import torch
from tokenizers import Tokenizer

from model.config import ModelConfig
from model.training.data import HELD_OUT_FILE, TRAINING_FILE, read_stories, train_tokenizer
from model.training.export import draw_loss_curve, write_checkpoint
from model.training.loop import Recipe, train


def main() -> None:
    """Train and export. The defaults are the bundled checkpoint's; its card tells the one
    difference."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m model.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=TRAINING_FILE, help="training corpus")
    parser.add_argument("--held-out", type=Path, default=HELD_OUT_FILE, help="held-out corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--batch-tokens", type=int, default=recipe.batch_tokens)
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    recipe = replace(
        recipe, steps=arguments.steps, batch_tokens=arguments.batch_tokens, seed=arguments.seed
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    stories, held_out = read_stories(arguments.data), read_stories(arguments.held_out)
    tokenizer_path = arguments.out / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer(stories, arguments.vocab_size).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=arguments.hidden,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        head_dim=arguments.hidden // arguments.heads,
        intermediate_size=arguments.intermediate,
        max_positions=recipe.context,
        tie_embeddings=True,
        family="llama",
    )
    model = train(
        config, recipe, tokenizer, stories, held_out, arguments.out, save_every=arguments.save_every
    )
    write_checkpoint(model, tokenizer, arguments.out / "checkpoint")
    draw_loss_curve(arguments.out / "log.jsonl", arguments.out / "loss.png")
    print(f"checkpoint in {arguments.out / 'checkpoint'}")


if __name__ == "__main__":
    main()
