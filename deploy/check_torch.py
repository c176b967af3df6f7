"""Before installing: will pip bring gigabytes of CUDA to a machine that has no GPU?

    python deploy/check_torch.py [words for pip]

On Linux the plain package index serves torch with CUDA, which is right for a GPU machine
and several gigabytes too much for another. pip is asked what it would take; when that
includes CUDA packages and `nvidia-smi` finds no GPU, this ends with an explanation instead.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

EXPLANATION = """\
This machine has no GPU (nvidia-smi finds none), and pip would install {count} CUDA packages
({examples}, ...), several gigabytes. Either

  - point pip at PyTorch's CPU builds (the index that pytorch.org names under
    "Get started", Compute Platform: CPU):  make install PIP_ARGS="--extra-index-url URL"
    or once and for all:                    pip config set global.extra-index-url URL
  - or take them all the same:              make install CUDA=yes
"""


def has_gpu() -> bool:
    """Whether NVIDIA's driver answers."""
    if shutil.which("nvidia-smi") is None:
        return False
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False)  # noqa: S607
    return answer.returncode == 0


def cuda_packages(pip_arguments: list[str]) -> list[str]:
    """Names of the CUDA packages that installing torch would bring, as pip resolves it."""
    command = [
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-"),
        *("--constraint", "constraints.txt", *pip_arguments, "torch"),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if answer.returncode:
        sys.exit(f"pip cannot resolve torch:\n{answer.stderr}")
    planned = [item["metadata"]["name"] for item in json.loads(answer.stdout)["install"]]
    return [name for name in planned if name.startswith(("nvidia-", "cuda-"))]


def main() -> None:
    """Exit with 1 and the explanation, or silently with 0."""
    if sys.platform != "linux" or has_gpu():
        return
    found = cuda_packages(sys.argv[1:])
    if found:
        sys.exit(EXPLANATION.format(count=len(found), examples=", ".join(sorted(found)[:3])))


if __name__ == "__main__":
    main()
