"""The subcommands of `vitrine`, one module each: `run(arguments) -> exit status`."""


class CommandError(Exception):
    """Something the user can act on; the command prints it as one line and exits with 1."""
