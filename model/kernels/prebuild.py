"""Compile the kernels ahead, for every kind of processor of this architecture:

    python -m model.kernels.prebuild

puts the libraries beside the C files, where `native.load` finds the one that fits. An image made
so needs no compiler, no folder from which code may be loaded, and no time for it at its start. In a
checkout there is no need: the kernels compile themselves for the machine at hand.
"""

from __future__ import annotations

import sys

from model.kernels import native
from model.kernels.processors import targets


def main() -> int:
    """Build all; 1 when there are none for this architecture."""
    built = [native.build_ahead(target) for target in targets()]
    for path in built:
        print(f"{path.name}: {path.stat().st_size:,} bytes")  # noqa: T201 - a command
    return 0 if built else 1


if __name__ == "__main__":
    sys.exit(main())
