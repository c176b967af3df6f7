"""`POISON=FAULT python -m tests.poisoned_server serve ...`: a server whose engine is at fault."""

from __future__ import annotations

import sys

import service.engine_process
from service.cli import main

if __name__ == "__main__":
    service.engine_process.ENGINE_MODULE = "tests.poisoned_engine"
    sys.exit(main())
