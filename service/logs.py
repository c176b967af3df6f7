"""What both processes write to standard error: one line an event, JSON for machines, columns for a
terminal; uvicorn's own lines too.

Everybody logs through `logging`; structlog only renders. What stands in `extra` becomes fields.
A request's line (service/api/visit.py) tells lengths and times, never the prompt or the text.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Literal, TextIO, get_args

if TYPE_CHECKING:
    from structlog.typing import Processor

LogFormat = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]

# The engine process is told by its environment, which it inherits.
LEVEL_VARIABLE = "VITRINE_LOG_LEVEL"
FORMAT_VARIABLE = "VITRINE_LOG_FORMAT"

# Control characters, and the two other ends of line that terminals and log readers know.
_UNPRINTABLE = {
    code: f"\\x{code:02x}" for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) != "\t"
} | {0x2028: "\\u2028", 0x2029: "\\u2029"}


def configure(level: LogLevel, format_: LogFormat, stream: TextIO | None = None) -> None:
    """Send every logger's lines to `stream` (standard error) in one shape. `auto` is columns on
    a terminal, JSON elsewhere. May be called again."""
    import structlog  # takes a tenth of a second, in which the engine process can begin

    stream = sys.stderr if stream is None else stream
    is_json = format_ == "json" or (format_ == "auto" and not stream.isatty())
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _one_line,
    ]
    last: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if is_json
        else [
            structlog.dev.ConsoleRenderer(
                colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Their `info` is a line a request, of a client library or with a client's own words in it.
    for noisy in ("httpx", "httpcore", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def tell_children(level: LogLevel, format_: LogFormat) -> None:
    """Make processes started from here log as this one does."""
    os.environ[LEVEL_VARIABLE], os.environ[FORMAT_VARIABLE] = level, format_


def configure_from_environment(environment: Mapping[str, str] = os.environ) -> None:
    """`configure` as `tell_children` said, or by default. Raises `ValueError` for another word."""
    level: LogLevel = environment.get(LEVEL_VARIABLE, "info")  # type: ignore[assignment]
    format_: LogFormat = environment.get(FORMAT_VARIABLE, "auto")  # type: ignore[assignment]
    if level not in get_args(LogLevel) or format_ not in get_args(LogFormat):
        raise ValueError(f"{LEVEL_VARIABLE} is {level!r} and {FORMAT_VARIABLE} {format_!r}")
    configure(level, format_)


def _one_line(
    _logger: object, _method: str, fields: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Every text in one line, whatever a client managed to get into it. A traceback, added later,
    has lines of its own."""
    for name, value in fields.items():
        if isinstance(value, str):
            fields[name] = value.translate(_UNPRINTABLE)
    return fields
