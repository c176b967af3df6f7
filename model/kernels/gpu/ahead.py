"""Compile the kernels for GPUs that are not here:

    python -m model.kernels.gpu.ahead                          # every variant in use, a table
    python -m model.kernels.gpu.ahead --shape gpt2 --dtype float32 --target 80

The interpreter runs a kernel without compiling it: it finds neither what the compiler refuses nor
what does not fit a GPU. Here a forward runs on torch's meta device. The launchers are called as
when serving, with the same numbers and alignments, and Triton, told that a GPU of the target is the
current one, compiles for it and launches nothing. ptxas comes with triton; no GPU, driver or
toolkit is needed. Not in a process with TRITON_INTERPRET=1, which does not compile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.backends.cuda import CudaBackend
from model.batch import ForwardBatch
from model.families import read_config
from model.families.published import PUBLISHED
from model.fused import FusedForward
from model.kernels.gpu.adjust import AdjustRows
from model.kernels.gpu.draw import DrawRows
from model.kernels.gpu.kernels import TRITON
from model.kv_cache import KVCache
from model.products import fixed_product, library_product
from model.transformer import Transformer

# Bytes of shared memory that a block of threads may have (CUDA C++ Programming Guide, table of
# technical specifications per compute capability).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
BLOCK_SIZE = 32
NUM_LAYERS = 2
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPTIONS = ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion", "launch_cooperative_grid")


# Steps of decodes of a few sizes, and one with chunks of prompts.
BATCHES = ([1], [1] * 8, [1] * 24, [1] * 256, [1, 1, 70, 700])


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to serve a model."""

    shape: str
    dtype: str = "bfloat16"
    deterministic: bool = False
    max_model_len: int = 2048

    def __str__(self) -> str:
        mode = "deterministic" if self.deterministic else "fastest"
        return f"{self.shape} {self.dtype} {mode} {self.max_model_len}"


@dataclass(frozen=True, slots=True)
class Compiled:
    """A variant of a kernel as a target has it. `stack_bytes` is each thread's local memory:
    registers that were spilled, and calls' frames."""

    kernel: str
    variant: str
    target: int
    setting: str
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    compile_s: float = 0.0
    error: str = ""  # what the compiler said, or what does not fit


_EVERY_KIND = tuple(
    Setting(shape, dtype, deterministic)
    for shape in ("llama-3.1-8b", "mistral-7b", "qwen3-0.6b", "qwen3-8b", "llama-2-7b", "gpt2")
    for dtype in DTYPES
    for deterministic in (False, True)
)
_LENGTHS = tuple(Setting("llama-3.1-8b", max_model_len=length) for length in (256, 131072))
SETTINGS = _EVERY_KIND + _LENGTHS


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int | None = None) -> int:
        return 0


@contextmanager
def collecting(capability: int, found: Callable[..., None]) -> Iterator[None]:
    """Launches in here launch nothing: each variant of a kernel is given to `found` as Triton
    would compile it for an NVIDIA GPU of `capability`, such as 90, once or oftener."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1: kernels are interpreted here, not compiled")
    target = GPUTarget("cuda", capability, 32)

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:  # noqa: A002 - Triton's name
        found(key, target, fn.jit_function, compile)
        return True  # "already there": Triton neither compiles nor launches

    triton.runtime.driver.set_active(_Driver(target))
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before
        with suppress(RuntimeError):  # no GPU here: there is none to go back to
            triton.runtime.driver.reset_active()


def compile_all(
    settings: tuple[Setting, ...], capability: int, only: str = ""
) -> Iterator[Compiled]:
    """Every variant of the kernels (those whose name holds `only`) that the settings launch."""
    wanted: dict[str, tuple[GPUTarget, Any, dict[str, Any], str]] = {}
    for setting in settings:

        def found(
            key: str, target: GPUTarget, kernel: Any, how: dict[str, Any], of: str = str(setting)
        ) -> None:
            wanted.setdefault(f"{kernel.__name__} {key}", (target, kernel, how, of))

        with collecting(capability, found):
            launch_all(setting)
    for target, kernel, how, of in wanted.values():
        if only in kernel.__name__:
            yield _compile(target, kernel, how, of)


def _compile(target: GPUTarget, kernel: Any, how: dict[str, Any], setting: str) -> Compiled:
    done = Compiled(kernel.__name__, _variant(kernel, how), target.arch, setting)
    source = ASTSource(kernel, how["signature"], how["constants"], how["configs"][0])
    began = time.monotonic()
    try:
        built = triton.compile(source, target=target, options={k: how[k] for k in OPTIONS})
    except Exception as error:  # noqa: BLE001 - the compiler raises what it likes: it is the find
        return replace(done, error=f"{type(error).__name__}: {error}")
    shared, limit = built.metadata.shared, SHARED_LIMIT[target.arch]
    registers, stack = _usage(built.asm["cubin"])
    return replace(
        done,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=shared,
        compile_s=round(time.monotonic() - began, 2),
        error=f"{shared} bytes of shared memory; a block has {limit}" if shared > limit else "",
    )


def _variant(kernel: Any, how: dict[str, Any]) -> str:
    """The types it takes and its constants, in words."""
    kinds = sorted({k[1:] for k in how["signature"].values() if k[:1] == "*"})
    constants = [
        f"{kernel.arg_names[place[0]]}={value}" for place, value in how["constants"].items()
    ]
    return " ".join([",".join(kinds), *constants, f"warps={how['num_warps']}"])


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(  # noqa: S603 - the tool that comes with triton
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
    return numbers["REG"], max(numbers["STACK"], numbers["LOCAL"])


@torch.inference_mode()
def launch_all(setting: Setting, batches: Iterable[list[int]] = BATCHES) -> None:
    """What a server launches over batches with so many tokens of each sequence, and all there is
    to draw."""
    whole = read_config(PUBLISHED[setting.shape])
    # The first layers stand for all of them.
    windows = whole.sliding_windows and whole.sliding_windows[:NUM_LAYERS]
    config = replace(whole, num_layers=NUM_LAYERS, sliding_windows=windows)
    dtype = DTYPES[setting.dtype]
    longest = min(setting.max_model_len, whole.max_positions)
    with torch.device("meta"):
        model = Transformer(config, max_positions=longest).to(dtype)
    model.place_position_tables("meta")
    cache = KVCache.allocate(
        config, num_blocks=64, block_size=BLOCK_SIZE, dtype=dtype, device="meta", by_token=True
    )
    backend = CudaBackend(config, cache, longest, setting.deterministic)
    make_product = fixed_product(TRITON) if setting.deterministic else library_product
    forward = FusedForward(model.eval(), backend, make_product=make_product)
    forward.reserve(num_seats=1025, num_rows=256)
    for lengths in batches:
        logits = forward(_batch(lengths, longest))
        _draw(forward, logits)


def _ints(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32, device="meta")


def _floats(*shape: int) -> Tensor:
    return torch.zeros(*shape, device="meta")


def _batch(lengths: list[int], max_model_len: int) -> ForwardBatch:
    starts = tuple(accumulate(lengths, initial=0))
    num_tokens, num_seqs = starts[-1], len(lengths)
    return ForwardBatch(
        input_ids=_ints(num_tokens),
        positions=_ints(num_tokens),
        query_start=_ints(num_seqs + 1),
        context_lens=_ints(num_seqs),
        block_tables=_ints(num_seqs, -(-max_model_len // BLOCK_SIZE)),
        slot_mapping=_ints(num_tokens),
        logits_rows=_ints(num_seqs),
        query_start_host=starts,
        context_lens_host=(max_model_len,) * num_seqs,
    )


def _draw(forward: FusedForward, logits: Tensor) -> None:
    rows = logits.shape[0]
    adjust = AdjustRows(
        penalty_starts=_ints(rows + 1),
        penalties=_ints(2**17, 3),
        bias_starts=_ints(rows + 1),
        biases=_ints(2**13, 2),
        repetition=_floats(rows),
        unread_seats=_ints(rows),
        unread_amounts=_floats(rows),
    )
    TRITON.adjust(logits, adjust, forward.last_tokens)
    draw = DrawRows(
        inverse_temperature=_floats(rows),
        top_k=_ints(rows),
        top_p=_floats(rows),
        min_p=_floats(rows),
        seeds=_ints(2, rows),
        positions=_ints(rows),
        seats=_ints(rows),
    )
    TRITON.draw(logits, draw, forward.last_tokens)


def main() -> int:
    """Print the table, a line as each is done; 1 when a variant cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m model.kernels.gpu.ahead")
    parser.add_argument("--shape", action="append", choices=sorted(PUBLISHED))
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--target", action="append", type=int, choices=list(SHARED_LIMIT))
    parser.add_argument("--kernel", default="", help="those whose name holds this word")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--json", type=Path, help="write it there too")
    given = parser.parse_args()
    settings = tuple(
        setting
        if given.max_model_len is None
        else replace(setting, max_model_len=given.max_model_len)
        for setting in SETTINGS
        if (given.shape is None or setting.shape in given.shape)
        and (given.dtype is None or setting.dtype in given.dtype)
    )
    rows: list[Compiled] = []
    print(f"{'kernel':24} {'sm':>3} {'regs':>4} {'stack':>5} {'shared':>7} {'s':>6}  variant")  # noqa: T201
    for capability in given.target or (90, 80):
        for row in compile_all(settings, capability, given.kernel):
            rows.append(row)
            print(  # noqa: T201
                f"{row.kernel:24} {row.target:3} {row.registers:4} {row.stack_bytes:5} "
                f"{row.shared_bytes:7} {row.compile_s:6.2f}  {row.variant} "
                f"({row.setting}) {row.error}",
                flush=True,
            )
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
