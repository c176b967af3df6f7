"""Kill the engine at random moments while streams run: no token is lost or doubled."""

from __future__ import annotations

import argparse

from loadtests.faults.common import add_server_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Not written yet."""
    raise SystemExit("not written yet")
