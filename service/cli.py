"""The `vitrine` command: picks a subcommand and turns failures into one line and a status.

Each subcommand is a module in service/commands/ with `run(arguments) -> exit status`, and is
imported only when asked for: `vitrine --help` answers at once, and `serve` does not load
torch.
"""

from __future__ import annotations

import importlib
import os
import sys

from service.commands import CommandError
from service.settings import SettingsError

COMMANDS = {
    "serve": "serve a model over HTTP: POST /generate, server-sent events",
    "generate": "continue a text in the terminal, without a server",
    "bench": "measure the engine's speed, memory and distance from what the machine can do",
    "keys": "draw API keys, each with the line to store",
    "heads": "measure what each attention head of a model does",
    "report": "load-test this machine and draw why inference needs GPUs; from a checkout",
    "inspect": "print a model's architecture, parameters and bytes, without loading weights",
}


def main() -> int:
    """Entry point of the console script."""
    # One prompt at a time is tokenized: a pool of threads for it would only take the cores
    # from the engine.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        sys.stderr.write(f"vitrine: there is no command {name!r}\n\n{_help()}")
        return 2
    command = importlib.import_module(f"service.commands.{name}")
    try:
        status: int = command.run(arguments[1:])
    except (CommandError, SettingsError) as error:
        sys.stderr.write(f"vitrine {name}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `vitrine generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _help() -> str:
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    return (
        "usage: vitrine <command> [options]\n\n"
        "A text-generation server in a glass case.\n\n"
        + "\n".join(lines)
        + "\n\n`vitrine <command> --help` lists its options.\n"
    )
