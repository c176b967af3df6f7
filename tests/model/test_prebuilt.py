"""Kernels compiled ahead: the right one is taken, and no other."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.compiled import CompiledForward
from model.kernels import native, prebuild, processors
from model.kernels.processors import TARGETS, Target
from model.kv_cache import KVCache
from tests.engine.engines import TINY_COMPILED, random_model

AVX512_BF16, AVX512, AVX2 = TARGETS["x86_64"]
# What GCC calls features that /proc/cpuinfo calls otherwise, or shows under another.
GCC_NAMES = {
    "avx512bf16": "avx512_bf16",
    "bmi": "bmi1",
    "crc32": "sse4_2",
    "lzcnt": "abm",
    "mwait": "pni",
    "sahf": "lahf_lm",
    "sse3": "pni",
    "sse4": "sse4_1",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
}
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64's features")


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where libraries compiled ahead lie in this test, and no other cache."""
    monkeypatch.setattr(native, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.load.cache_clear()
    yield tmp_path / "prebuilt"
    native.load.cache_clear()


def pretend_built(*targets: Target) -> None:
    for target in targets:
        path = native._path_ahead(target)
        path.parent.mkdir(exist_ok=True)
        path.touch()


@x86_only
@pytest.mark.parametrize(
    ("here", "taken"),
    [
        (AVX512_BF16.needs | {"amx_tile"}, AVX512_BF16),
        (AVX512.needs, AVX512),
        (AVX512_BF16.needs - {"avx512vl"}, AVX2),
        (AVX2.needs, AVX2),
        (AVX2.needs - {"fma"}, None),
        (frozenset(), None),
    ],
)
def test_the_best_that_the_processor_can_run_is_taken(
    monkeypatch: pytest.MonkeyPatch, ahead: Path, here: frozenset[str], taken: Target | None
) -> None:
    pretend_built(AVX2, AVX512, AVX512_BF16)
    monkeypatch.setattr(native, "features", lambda: here)
    assert native._built_ahead() == (taken and native._path_ahead(taken))


@x86_only
def test_libraries_of_other_sources_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, ahead: Path, tmp_path: Path
) -> None:
    pretend_built(AVX2)
    monkeypatch.setattr(native, "features", lambda: AVX2.needs)
    assert native._built_ahead() is not None
    changed = tmp_path / "linear.c"
    changed.write_text("/* another */")
    monkeypatch.setattr(native, "SOURCES", (*native.SOURCES[:2], changed))
    assert native._built_ahead() is None


@x86_only
@pytest.mark.parametrize("target", TARGETS["x86_64"], ids=lambda target: target.name)
def test_a_target_needs_all_that_the_compiler_may_use(target: Target) -> None:
    """Otherwise a processor without it would die of an illegal instruction."""

    def enabled(*flags: str) -> set[str]:
        command = ["gcc", *flags, "-Q", "--help=target"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        words = [line.split() for line in said.splitlines()]
        return {w[0].removeprefix("-m") for w in words if w[1:] == ["[enabled]"]}

    used = enabled(*target.flags) - enabled("-march=x86-64")
    assert "avx2" in used
    assert {GCC_NAMES.get(name, name) for name in used} <= target.needs


@pytest.mark.slow
def test_an_installation_with_all_of_them_needs_no_compiler_and_no_folder(
    monkeypatch: pytest.MonkeyPatch, ahead: Path, tmp_path: Path
) -> None:
    assert prebuild.main() == 0
    assert len(list(ahead.iterdir())) == len(processors.targets())
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    cache = KVCache.allocate(TINY_COMPILED, num_blocks=1, block_size=16, dtype=torch.float32)
    CompiledForward(random_model(TINY_COMPILED), cache)
    assert not (tmp_path / "cache").exists()


def test_an_architecture_without_targets_builds_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch, ahead: Path
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert prebuild.main() == 1
    assert native._built_ahead() is None
