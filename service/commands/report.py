"""`vitrine report`: measure this machine and make the page on why inference needs GPUs.

The work is in loadtests/, which is no part of the installed package: the server does not bring
its load tests along. So this command runs `python -m loadtests.report` from the checkout that
`service` lies in, and says so when it lies in none.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import service
from service.commands import CommandError

# Of the extra `load`, by the module that each is imported as.
NEEDED = ("locust", "matplotlib", "httpx2", "psutil")


def run(arguments: list[str]) -> int:
    """Become the report's process. Raises `CommandError` where it cannot be run."""
    root = Path(service.__file__).resolve().parents[1]
    check(root)
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    # The same process: Ctrl-C, the terminal and the exit status are the report's.
    command = [sys.executable, "-m", "loadtests.report", *arguments]
    os.execve(sys.executable, command, os.environ | {"PYTHONPATH": path})  # noqa: S606


def check(root: Path) -> None:
    """Raise `CommandError` when the report is not in `root` or something it needs is missing."""
    if not (root / "loadtests" / "report" / "__main__.py").is_file():
        raise CommandError(
            "the report is made from a checkout of the repository, and this vitrine is installed "
            "without one; in a checkout, `make report` does everything"
        )
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} not installed; pip install 'vitrine[load]'")
