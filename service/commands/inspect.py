"""`vitrine inspect --model X`: what a model is made of, matrix by matrix."""

from __future__ import annotations

import sys

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console

from service.commands import CommandError
from service.settings import CommandSettings, read_settings

PIPED_WIDTH = 110


class InspectSettings(CommandSettings):
    """Print a model's architecture with the parameters of every matrix and the bytes they
    take. Only the numbers of its config are read, never its weights."""

    model_config = SettingsConfigDict(cli_prog_name="vitrine inspect")

    model: str | None = Field(
        None,
        description="a checkpoint directory, a config.json, or a published model such as "
        "gpt2 or llama-2-7b; without it, the bundled model",
    )


def run(arguments: list[str]) -> int:
    """Print the tables."""
    settings = read_settings(InspectSettings, arguments)
    from model.checkpoint_files import CheckpointError, bundled_checkpoint
    from model.config import ConfigError
    from model.inspection import find_config, inspect, render

    try:
        config = find_config(settings.model or str(bundled_checkpoint()))
    except (CheckpointError, ConfigError) as error:
        raise CommandError(str(error)) from None
    # Into a pipe there is no width to keep to, and a number cut short is worth nothing.
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    Console(width=width).print(render(inspect(config)))
    return 0
