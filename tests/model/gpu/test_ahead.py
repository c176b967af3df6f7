"""The kernels compiled for GPUs that are not here: the interpreter finds neither what the compiler
refuses nor what does not fit.

In processes without TRITON_INTERPRET=1, which the tests run under on a CPU: it does not compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.kernels.gpu.kernels import TRITON

ROOT = Path(__file__).parents[3]
KERNELS = {
    "_embed_kernel",
    "_add_norm_kernel",
    "_rotary_write_kernel",
    "_split_kernel",
    "_combine_kernel",
    "_prefill_kernel",
    "_silu_mul_kernel",
    "_product_kernel",
    "_adjust_kernel",
    "_draw_kernel",
}
# Bytes of registers that a thread may spill: an A100's compiler cannot help a few.
MOST_SPILLED = {"bfloat16": 96, "float16": 96, "float32": 640}


def run(*words: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def compiled(tmp_path: Path, target: int, dtype: str, shapes: tuple[str, ...]) -> list[Any]:
    """Every variant, as model/kernels/gpu/ahead.py says."""
    out = tmp_path / "compiled.json"
    words = [word for shape in shapes for word in ("--shape", shape)]
    run(
        *("-m", "model.kernels.gpu.ahead", *words),
        *("--target", str(target), "--dtype", dtype, "--json", str(out)),
    )
    rows: list[Any] = json.loads(out.read_text())
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtype", "shapes"),
    [
        (90, "bfloat16", ()),  # all of them, sliding windows and vocabularies of 32k to 152k
        (80, "bfloat16", ("llama-3.1-8b",)),
        (90, "float32", ("qwen3-0.6b", "gpt2")),
        (80, "float32", ("llama-3.1-8b",)),
        (90, "float16", ("gpt2",)),
    ],
)
def test_every_kernel_compiles_and_fits(
    tmp_path: Path, target: int, dtype: str, shapes: tuple[str, ...]
) -> None:
    rows = compiled(tmp_path, target, dtype, shapes)
    expected = KERNELS - {"_silu_mul_kernel"} if shapes == ("gpt2",) else KERNELS
    assert {row["kernel"] for row in rows} == expected
    for row in rows:
        assert not row["error"], row
        assert 0 < row["registers"] <= 255, row
        assert row["stack_bytes"] <= MOST_SPILLED[dtype], row
    if not shapes:
        windows = {row["variant"] for row in rows if "has_window=True" in row["variant"]}
        assert len(windows) == 2, "decode and prefill"


COLLECT = """
import json
from model.kernels.gpu.ahead import Setting, collecting, launch_all

def variants(batches):
    found = set()
    with collecting(90, lambda key, target, kernel, how: found.add(kernel.__name__ + " " + key)):
        launch_all(Setting("qwen3-0.6b", deterministic=True), batches)
    return found

buckets = [variants([[1] * size]) for size in (1, 2, 8, 48, 320)]
print(json.dumps({
    "differing": sorted(set().union(*buckets) - buckets[0]),
    "names": sorted({name.split()[0] for name in buckets[0] | variants([[3, 40]])}),
}))
"""


def test_another_number_of_rows_compiles_nothing_anew() -> None:
    """Or the capture of 19 buckets would be 19 compilations, and a prompt of a new length would
    stop all streams for a second."""
    found = json.loads(run("-c", COLLECT))
    assert found["differing"] == []
    assert set(found["names"]) | {"_split_kernel", "_combine_kernel"} == KERNELS


def test_an_interpreting_process_says_that_it_does_not_compile() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    words = [sys.executable, "-m", "model.kernels.gpu.ahead", "--shape", "gpt2"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "kernels are interpreted here, not compiled" in done.stderr


def test_every_launcher_is_in_the_table() -> None:
    """A new kernel must be added above."""
    assert len(TRITON.__slots__) + 1 == len(KERNELS), "decode attention has two kernels"
