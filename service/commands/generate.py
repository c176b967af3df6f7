"""`vitrine generate "Once upon a time"`: the engine in this process, the text on stdout."""

from __future__ import annotations

import os
import secrets
import sys
import time
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from model.sampling_params import SamplingParams
from model.threads import set_wait_policy
from service.commands import CommandError
from service.settings import ModelSettings, engine_config, read_settings


class GenerateSettings(ModelSettings):
    """Continue PROMPT on standard output, token by token. What was drawn with which seed,
    and how fast, goes to standard error."""

    model_config = SettingsConfigDict(cli_prog_name="vitrine generate")

    prompt: CliPositionalArg[str] = Field(description="the text to continue")
    max_tokens: int | None = Field(
        None, ge=1, description="tokens to generate at most; without it, 256 or what fits"
    )
    temperature: float = Field(1.0, ge=0, le=2, description="0 always takes the likeliest token")
    top_k: int = Field(0, ge=0, description="draw from the k likeliest tokens; 0 is off")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the likeliest that sum to p")
    min_p: float = Field(0.0, ge=0, lt=1, description="drop tokens under min-p times the top one")
    repetition_penalty: float = Field(1.0, gt=0, le=2, description="above 1 avoids repetition")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="the same seed gives the same text; drawn if not given"
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="end before this text; may be given several times"
    )


DEFAULT_MAX_TOKENS = 256


def run(arguments: list[str]) -> int:
    """Generate until end of text, a stop or max_tokens; Ctrl-C ends it with what is there."""
    settings = read_settings(GenerateSettings, arguments)
    set_wait_policy(os.environ)  # before torch is imported

    from model.checkpoint import CheckpointError
    from model.config import ConfigError
    from model.hub import HubError, resolve_model
    from model.tokenizer import TokenizerError
    from service.engine.start import StartError

    try:
        directory = resolve_model(settings.model, settings.revision)
        _generate(settings, directory)
    except (HubError, CheckpointError, ConfigError, TokenizerError, StartError) as error:
        raise CommandError(str(error)) from None
    return 0


def _generate(settings: GenerateSettings, directory: Path) -> None:
    from model.tokenizer import IncrementalDecoder, Tokenizer
    from service.api.text import AnswerText, StopStrings
    from service.engine.messages import Submit
    from service.engine.start import start_engine

    tokenizer = Tokenizer.from_directory(directory)
    core, info = start_engine(engine_config(settings, directory), progress=sys.stderr.isatty())
    prompt_token_ids = tokenizer.encode(settings.prompt)
    room = info.context_length - len(prompt_token_ids)
    params = SamplingParams(
        max_tokens=settings.max_tokens or max(1, min(DEFAULT_MAX_TOKENS, room)),
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        seed=secrets.randbelow(2**63) if settings.seed is None else settings.seed,
    )
    decoder = IncrementalDecoder(tokenizer, prompt_token_ids)
    answer = AnswerText(decoder, StopStrings(settings.stop), min_tokens=0)
    refusal = core.scheduler.refusal(len(prompt_token_ids), params.max_tokens)
    if refusal is not None:
        raise CommandError(refusal)
    began = time.monotonic()
    num_tokens = 0
    stopped = False
    core.add(Submit(1, prompt_token_ids, params))
    sys.stdout.write(settings.prompt)
    try:
        while core.has_work and not stopped:
            for output in core.step():
                if output.error is not None:
                    raise CommandError(output.error)
                num_tokens += len(output.token_ids)
                piece = answer.push(output.token_ids)
                stopped = piece.stop is not None
                sys.stdout.write(piece.text)
                sys.stdout.flush()
        if not stopped:
            sys.stdout.write(answer.finish().text)
    finally:
        elapsed_s = time.monotonic() - began
        sys.stdout.write("\n")
        sys.stdout.flush()
        sys.stderr.write(
            f"seed {params.seed}; {num_tokens} tokens in {elapsed_s:.2f} s, "
            f"{num_tokens / elapsed_s:.0f} tokens/s\n"
        )
