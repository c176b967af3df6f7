"""`python -m loadtests.faults NAME`: break something and see whether the promises hold."""

from __future__ import annotations

import argparse
import importlib
import sys

# Each is a module here with `add_arguments(parser)` and `run(args) -> exit status`; its
# docstring is its help.
NAMES: dict[str, str] = {
    "kill": "loadtests.faults.kill",
    "stall": "loadtests.faults.stall",
    "poison": "loadtests.faults.poison",
    "sigterm": "loadtests.faults.sigterm",
    "soak": "loadtests.faults.soak",
    "connections": "loadtests.faults.connections",
    "disconnects": "loadtests.faults.disconnects",
    "never-read": "loadtests.faults.never_read",
    "schema": "loadtests.faults.schema",
}


def main() -> int:
    """Exit status: 0 all promises kept, 1 one was broken, 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.faults", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, path in NAMES.items():
        module = importlib.import_module(path)
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args()
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
