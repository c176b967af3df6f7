"""`vitrine keys`: draw API keys, each with the line to store."""

from __future__ import annotations

from service.api.keys import KeyFileError, new_key
from service.commands import CommandError

USAGE = """usage: vitrine keys NAME...

Prints a new API key for each name, and the line for the file that `vitrine serve --api-key-file`
reads. The line holds a digest only: the key cannot be got back from it, so keep it now.
"""


def run(arguments: list[str]) -> int:
    """Print a key and a line for each name. Raises `CommandError` for a name that is no word."""
    if not arguments or any(argument.startswith("-") for argument in arguments):
        print(USAGE, end="")
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        drawn = [new_key(name) for name in arguments]
    except KeyFileError as error:
        raise CommandError(str(error)) from None
    for key, line in drawn:
        print(f"key:  {key}\nline: {line}")
    return 0
