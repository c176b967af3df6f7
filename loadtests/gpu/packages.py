"""What the parts of a run need, and how to bring it to a machine without a network:

    python -m loadtests.gpu.packages --python 3.12

fills .gpu-packages/3.12 with wheels for Linux on x86-64; parts find it there by themselves. torch,
triton and transformers are never brought: they must fit the machine's driver.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BROUGHT = ROOT / ".gpu-packages"

ENGINE = (
    "torch", "triton", "numpy", "safetensors", "tokenizers", "jaxtyping", "msgspec", "rich",
)  # fmt: skip
TRANSFORMERS = (*ENGINE, "transformers")
SERVER = (
    *ENGINE,
    *("huggingface_hub", "jinja2", "fastapi", "uvicorn", "httptools"),
    *("pydantic", "pydantic_settings", "prometheus_client", "structlog"),
    *("httpx2", "psutil"),  # the client's
)
TESTS = (
    *SERVER,
    *("transformers", "pytest", "pytest_asyncio", "pytest_timeout", "xdist", "hypothesis"),
)
# As they are called where they come from.
DISTRIBUTIONS = (
    "jaxtyping", "msgspec", "rich", "safetensors", "tokenizers", "jinja2", "fastapi", "uvicorn",
    "httptools", "pydantic", "pydantic-settings", "prometheus-client",
    "structlog", "httpx2", "psutil", "pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist",
    "hypothesis",
)  # fmt: skip


def folder_of(python: str | None = None) -> Path | None:
    """What was brought for a Python, such as this one; None when nothing was."""
    folder = BROUGHT / (python or f"{sys.version_info.major}.{sys.version_info.minor}")
    return folder if folder.is_dir() else None


def missing(modules: tuple[str, ...]) -> list[str]:
    """Those that a part could not import."""
    brought = folder_of()
    return [
        module
        for module in modules
        if importlib.util.find_spec(module) is None
        and not (brought is not None and any(brought.glob(f"{module}*")))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.gpu.packages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", required=True, help="of the GPU's machine, such as 3.12")
    parser.add_argument("names", nargs="*", default=DISTRIBUTIONS, help="some of them only")
    given = parser.parse_args()
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--upgrade"),
        *("--target", str(BROUGHT / given.python), "--python-version", given.python),
        *("--only-binary", ":all:", "--platform", "manylinux2014_x86_64"),
        *("--platform", "manylinux_2_28_x86_64", "--constraint", str(ROOT / "constraints.txt")),
    ]
    return subprocess.run([*command, *given.names]).returncode


if __name__ == "__main__":
    sys.exit(main())
