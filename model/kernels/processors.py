"""Kinds of processors that the kernels can be compiled for ahead, and which of them fit here.

One per branch of the C code. The names are GCC's and clang's (the levels of the x86-64 psABI);
what a level needs is written as /proc/cpuinfo spells it, which shows only what the operating
system has switched on too.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")

_V3 = "cx16 lahf_lm pni ssse3 sse4_1 sse4_2 popcnt xsave abm avx avx2 bmi1 bmi2 f16c fma movbe"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of processor: what the compiler is told, and the features it must have."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


# The best first.
TARGETS: dict[str, tuple[Target, ...]] = {
    "x86_64": (
        Target(
            "avx512-bf16",
            ("-march=x86-64-v4", "-mavx512bf16"),
            frozenset(f"{_V4} avx512_bf16".split()),
        ),
        Target("avx512", ("-march=x86-64-v4",), frozenset(_V4.split())),
        Target("avx2", ("-march=x86-64-v3",), frozenset(_V3.split())),
    ),
    # Every 64-bit ARM has NEON, and the C code asks for no more.
    "aarch64": (Target("neon", ("-march=armv8-a",), frozenset()),),
}


def targets() -> tuple[Target, ...]:
    """What can be compiled ahead on this architecture, the best first; empty for others."""
    return TARGETS.get(platform.machine(), ())


def features() -> frozenset[str]:
    """What /proc/cpuinfo says of the first processor; empty where there is no such file."""
    if not CPU_INFO.exists():
        return frozenset()
    for line in CPU_INFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
