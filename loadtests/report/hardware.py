"""What data sheets say about GPUs that are not here, and prices and watts to compute with.

Everything computed from these is labelled as computed. Prices are assumptions, printed wherever
they are used and editable in the page.
"""

from __future__ import annotations

from dataclasses import dataclass

from loadtests.report.records import Host, Roof


@dataclass(frozen=True, slots=True)
class DataSheet:
    """A device as its maker describes it. `memory_bytes` bounds the models that fit."""

    name: str
    roof: Roof  # bfloat16, dense
    memory_bytes: float
    watts: float
    source: str


# The data sheets print 1,979 TFLOP/s of bfloat16 "with sparsity"; dense products get half of it.
H100 = DataSheet(
    "H100 SXM",
    Roof(3.35e12, 989.5e12),
    80e9,
    700,
    "NVIDIA H100 Tensor Core GPU data sheet (SXM): 3.35 TB/s, 1,979 TFLOP/s with sparsity, 700 W",
)
H200 = DataSheet(
    "H200 SXM",
    Roof(4.8e12, 989.5e12),
    141e9,
    700,
    "NVIDIA H200 Tensor Core GPU data sheet (SXM): 4.8 TB/s, 1,979 TFLOP/s with sparsity, 700 W",
)
DATA_SHEETS = (H100, H200)


@dataclass(frozen=True, slots=True)
class Running:
    """What a device costs while it runs, busy or not."""

    dollars_per_hour: float
    watts: float


# Assumptions, not quotations: about what clouds asked for on demand in 2025. The watts of a CPU are
# its cores' share of a server's, those of a GPU its data sheet's limit without the host around it.
DOLLARS_PER_CORE_HOUR = 0.05
WATTS_PER_CORE = 5.0
DOLLARS_PER_HOUR = {"H100": 3.0, "H200": 3.8}
WATTS = {"H100": H100.watts, "H200": H200.watts}
UNKNOWN_GPU = Running(2.0, 400.0)


def running_costs(name: str, host: Host | None, prices: dict[str, Running]) -> Running:
    """Of a device called `name` in the figures; `prices` are the user's own."""
    if name in prices:
        return prices[name]
    for gpu in DOLLARS_PER_HOUR:
        if gpu in name:
            return Running(DOLLARS_PER_HOUR[gpu], WATTS[gpu])
    if host is not None and host.accelerator is None:
        return Running(host.cores * DOLLARS_PER_CORE_HOUR, host.cores * WATTS_PER_CORE)
    return UNKNOWN_GPU
