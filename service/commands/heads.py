"""`vitrine heads`: what each attention head of a model does, as a table, JSON and a picture."""

from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console

from model.threads import set_wait_policy
from service.commands import CommandError
from service.settings import CommandSettings, read_settings

PIPED_WIDTH = 140


class HeadsSettings(CommandSettings):
    """Test every attention head: how much it looks at the token before, at the first token, at
    earlier places of the same token, at what followed last time (induction), and from a pronoun
    at the noun that it can mean."""

    model_config = SettingsConfigDict(cli_prog_name="vitrine heads")

    model: str | None = Field(
        None,
        description="a checkpoint directory or a hub id (org/name); without it, the bundled model",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights")
    text: Path | None = Field(
        None,
        description="texts to look at, UTF-8, perhaps gzipped, <|endoftext|> between two; without "
        "it, the stories that the bundled model was not trained on (CDLA-Sharing-1.0)",
    )
    max_texts: int = Field(40, ge=1, description="how many of them, from the first one")
    max_tokens: int = Field(256, ge=2, description="of each, from its beginning")
    seed: int = Field(0, ge=0, lt=2**31, description="of the random sequences")
    out: Path | None = Field(None, description="write every head's figures to this JSON file")
    picture: Path | None = Field(
        None, description="draw them into this .png or .svg; needs the extra [train]"
    )


def run(arguments: list[str]) -> int:
    """Measure, print, write."""
    settings = read_settings(HeadsSettings, arguments)
    if settings.picture is not None and settings.picture.suffix not in (".png", ".svg"):
        raise CommandError(f"--picture {settings.picture}: .png and .svg are drawn")
    set_wait_policy(os.environ)  # before torch is imported

    from model.checkpoint import CheckpointError
    from model.config import ConfigError
    from model.explain.heads import PictureError
    from model.explain.recording import ExplainError
    from model.hub import HubError, resolve_model
    from model.tokenizer import TokenizerError

    try:
        _measure(settings, resolve_model(settings.model, settings.revision))
    except (
        HubError,
        CheckpointError,
        ConfigError,
        TokenizerError,
        ExplainError,
        PictureError,
        OSError,
    ) as error:
        raise CommandError(str(error)) from None
    return 0


def _measure(settings: HeadsSettings, directory: Path) -> None:
    import torch

    from model.checkpoint import load_checkpoint
    from model.explain.heads import draw_heads, heads_table, measure_heads
    from model.tokenizer import Tokenizer
    from model.training.data import HELD_OUT_FILE, read_stories

    path = settings.text or HELD_OUT_FILE
    try:
        texts = read_stories(path)[: settings.max_texts]
    except (UnicodeDecodeError, EOFError, zlib.error) as error:
        raise CommandError(f"--text {path}: {error}") from None
    if not texts:
        raise CommandError(f"--text {path}: there is no text in it")
    checkpoint = load_checkpoint(
        directory,
        dtype=getattr(torch, settings.dtype),
        progress=sys.stderr.isatty(),
    )
    report = measure_heads(
        checkpoint,
        Tokenizer.from_directory(directory),
        texts,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        progress=sys.stderr.isatty(),
    )
    title = (
        f"heads of {settings.model or directory.name}: {report.num_texts} texts, "
        f"{report.num_tokens:,} tokens; {4 * report.num_fours} sentences with pronouns"
    )
    # Into a pipe there is no width to keep to, and a number cut short is worth nothing.
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    Console(width=width).print(heads_table(report, title))
    if settings.out is not None:
        about = {
            "model": settings.model or directory.name,
            "dtype": settings.dtype,
            "text": path.name,
            "seed": settings.seed,
        }
        settings.out.write_text(json.dumps(about | report.as_json(), indent=1) + "\n")
    if settings.picture is not None:
        draw_heads(report, settings.picture, title)
