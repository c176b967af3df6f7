"""The tests of the compiled forward, compiled for a lesser processor than this one.

    python -m tests.model.portable_kernels x86-64-v3 FOLDER

x86-64-v3 is AVX2, x86-64-v4 AVX-512 without bfloat16: branches of the C code that are not compiled
where `-march=native` is more. FOLDER keeps the library.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from model.kernels import native


def main(march: str, folder: str) -> int:
    os.environ["XDG_CACHE_HOME"] = folder
    native.PREBUILT = Path(folder) / "none"
    native.HERE = (f"-march={march}",)
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider"]
    return int(
        pytest.main([*options, "tests/model/test_compiled.py", "tests/model/test_attended.py"])
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
