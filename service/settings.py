"""Every setting, read once: flags, then VITRINE_* environment variables, then defaults.

`vitrine serve --max-num-seqs 16` and `VITRINE_MAX_NUM_SEQS=16 vitrine serve` say the same.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

from service.engine.messages import EngineConfig, Measured
from service.logs import LogFormat, LogLevel

ENVIRONMENT_PREFIX = "VITRINE_"
GIB = 2**30


T = TypeVar("T", bound="CommandSettings")


class SettingsError(ValueError):
    """A flag or environment variable is wrong; the message names it, its value and limits."""


class CommandSettings(BaseSettings):
    """How flags and environment variables are read, for every command."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )


class ModelSettings(CommandSettings):
    """Which model, where and how: shared by every command that runs one."""

    model: str | None = Field(
        None,
        description="a checkpoint directory or a hub id (org/name); without it, the bundled model",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "float8"] = Field(
        "auto",
        description="of weights and KV cache; auto: float32 on a CPU, else the checkpoint's; int8: "
        "weights of products in int8, the rest in bfloat16 (CPU); float8: likewise (GPU)",
    )
    max_model_len: int | None = Field(
        None, ge=1, description="context length in tokens; without it, the model's own"
    )
    max_num_seqs: int = Field(64, ge=1, le=4096, description="sequences in one step at most")
    max_batched_tokens: int = Field(
        1024, ge=1, le=2**20, description="tokens in one step at most: decodes and prompt chunks"
    )
    max_step_ratio: float = Field(
        2.0,
        ge=0,
        le=1000,
        description="prompts that come while streams write are taken in chunks that make a step "
        "about so many times as long at most, and longer where more requests begin than run; "
        "0: whole budgets",
    )
    kv_cache_gb: float | None = Field(
        None, gt=0, description="memory for keys and values in GiB; without it, chosen by need"
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of a GPU's memory to use: what weights and the largest step leave of it "
        "is for keys and values, unless kv-cache-gb says how much is",
    )
    overlap: bool = Field(
        True,
        description="on a GPU, prepare the next step while one runs; a CPU does one at a time",
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        le=64,
        description="GPUs of this machine over which the model is cut, cuda:0 and on; heads, KV "
        "heads and the MLP's width must be multiples of it",
    )
    block_size: int = Field(32, ge=1, le=512, description="tokens in one KV block")
    threads: int | None = Field(
        None, ge=1, description="compute threads of the engine on a CPU; without it, torch's choice"
    )
    deterministic: bool = Field(
        True, description="the same request gives the same tokens, whatever else is in the batch"
    )


class Settings(ModelSettings):
    """Serve a model over HTTP. Every flag is also an environment variable, VITRINE_<FLAG>."""

    model_config = SettingsConfigDict(cli_prog_name="vitrine serve")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 chooses a free one")
    served_model_name: str | None = Field(
        None, description="the name clients see; without it, the model's directory or hub id"
    )
    chat_template: Path | None = Field(
        None, description="file with the Jinja chat template; without it, the checkpoint's own"
    )
    api_key_file: Path | None = Field(
        None,
        description="file with one API key a line: name:sha256:<hex> (see `vitrine keys`), "
        "name:key or key; without keys, everyone is let in",
    )
    api_keys: str | None = Field(
        None,
        description="keys as in the file, separated by commas: meant for VITRINE_API_KEYS, as "
        "command lines are seen by every user of a machine",
    )
    max_queue_requests: int = Field(
        256,
        ge=0,
        description="sequences that may wait beyond max-num-seqs before 429; into "
        "an empty house goes any request",
    )
    max_queue_tokens: int = Field(
        2**20,
        ge=1,
        description="prompt and max_tokens of all requests that wait for their first token, "
        "together, before 429; into an empty queue goes any request",
    )
    max_requests_per_key: int | None = Field(
        None, ge=1, description="requests of one API key in flight before 429; without it, any"
    )
    max_tokens_per_minute_per_key: int | None = Field(
        None,
        ge=1,
        description="tokens of one API key, prompts and max_tokens, before 429; without it, any",
    )
    max_connections: int = Field(4096, ge=1, description="open connections at most")
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="largest request body")
    request_timeout_s: float = Field(
        600.0, gt=0, description="longest time a request may take, and the default of timeout_s"
    )
    keep_alive_s: float = Field(15.0, gt=0, description="silence before a keep-alive comment")
    max_events_s: float = Field(
        640.0, gt=0, description="events a second, of all streams; beyond, tokens share events"
    )
    slow_reader_s: float = Field(
        60.0, gt=0, description="a client that takes nothing of what waits for so long is cut off"
    )
    max_detachable: int = Field(
        128, ge=0, description="requests with detach_s that are kept at a time before 429"
    )
    max_detach_bytes: int = Field(
        4 * 2**20, ge=1024, description="of events kept for one of them; past it, it fails"
    )
    explain: bool = Field(
        True, description="POST /explain, and `explain` in POST /generate; --no-explain: neither"
    )
    max_explain_tokens: int = Field(
        256, ge=1, le=2**20, description="longest text of an explanation, in tokens"
    )
    max_explain_weights: int = Field(
        4 * 2**20, ge=1, description="attention weights in the answer of an explanation"
    )
    max_explain_queue: int = Field(
        8, ge=1, description="explanations that run, wait or are being sent, before 429"
    )
    explain_timeout_s: float = Field(
        60.0, gt=0, description="an explanation for which the streams leave no time is given up"
    )
    drain_s: float = Field(30.0, ge=0, description="time for running requests after SIGTERM")
    stall_s: float = Field(
        30.0, ge=2, description="silence after which the engine is taken for dead and replaced"
    )
    standby: bool = Field(
        True,
        description="keep a second engine process that has its libraries loaded (150 MB) and "
        "no weights: a dead engine is replaced a second or two sooner",
    )
    cors_origins: str | None = Field(
        None,
        description="origins whose pages may call this server from a browser, separated by commas "
        "(https://example.org), or *; without it, none",
    )
    tls_cert: Path | None = Field(
        None, description="certificate chain (PEM); with it the server speaks HTTPS only"
    )
    tls_key: Path | None = Field(None, description="private key of tls-cert, if not in that file")
    tls_client_ca: Path | None = Field(
        None, description="authorities (PEM): ask every client for a certificate of theirs"
    )
    log_level: LogLevel = Field("info", description="of logs")
    log_format: LogFormat = Field(
        "auto", description="json, console, or auto: console on a terminal, else json"
    )
    roofline: str = Field(
        "idle",
        description="what this machine can do at best, for metrics: idle measures it shortly when "
        "there is nothing else to do, off does not, BYTES_PER_S,FLOPS_PER_S (`vitrine bench` has "
        "both) takes your word",
    )
    metric_aliases: str = Field(
        "",
        description="show metrics under others' names too: otel, gateway, or both with a comma "
        "(docs/metrics.md)",
    )
    otlp_endpoint: str | None = Field(
        None,
        description="send traces to this OpenTelemetry collector (OTLP over HTTP), as "
        "OTEL_EXPORTER_OTLP_ENDPOINT does; needs vitrine[otel]",
    )


def read_settings(kind: type[T], arguments: list[str]) -> T:
    """Parse flags and environment into `kind`; raises `SettingsError` for what is wrong."""
    fields = [*Settings.model_fields, *kind.model_fields]
    known = {ENVIRONMENT_PREFIX + name.upper() for name in fields}
    for name in os.environ:
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            raise SettingsError(f"{name} is not a setting; see `vitrine serve --help`")
    try:
        return CliApp.run(kind, cli_args=arguments)
    except ValidationError as error:
        raise SettingsError("; ".join(_describe(e) for e in error.errors())) from None


def engine_config(settings: ModelSettings, model_dir: Path) -> EngineConfig:
    """What the engine process is told. Raises `SettingsError` when two settings disagree."""
    if settings.max_batched_tokens < settings.max_num_seqs:
        raise SettingsError(
            f"--max-batched-tokens {settings.max_batched_tokens} is less than --max-num-seqs "
            f"{settings.max_num_seqs}: a step could not give every sequence its one token"
        )
    return EngineConfig(
        model_dir=str(model_dir),
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=settings.max_batched_tokens,
        max_step_ratio=settings.max_step_ratio,
        kv_cache_bytes=None if settings.kv_cache_gb is None else int(settings.kv_cache_gb * GIB),
        block_size=settings.block_size,
        threads=settings.threads,
        deterministic=settings.deterministic,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        overlap=settings.overlap,
        tensor_parallel_size=settings.tensor_parallel_size,
    )


def given_roofline(text: str) -> Measured | None:
    """What --roofline says of the machine; None when it leaves that to be measured, or not.
    Raises `SettingsError`."""
    if text in ("idle", "off"):
        return None
    try:
        read_bytes_per_s, flops_per_s = (float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(
            f"--roofline {text!r}: idle, off, or two numbers as in 40e9,500e9"
        ) from None
    if not (0 < read_bytes_per_s < math.inf and 0 < flops_per_s < math.inf):
        raise SettingsError(f"--roofline {text!r}: both numbers must be above 0 and finite")
    return Measured(read_bytes_per_s, flops_per_s)


def _describe(error: ErrorDetails) -> str:
    """One wrong setting in words: its flag, its value, what was expected."""
    name = str(error["loc"][0]) if error["loc"] else "arguments"
    flag = "--" + name.replace("_", "-")
    return f"{flag} {error['input']!r}: {error['msg']}"
