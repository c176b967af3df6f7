"""How long a device did nothing, from when its kernels and copies ran."""

from __future__ import annotations

# Between two kernels of a graph lie a microsecond or two; longer, the device waited for the host.
LONG_US = 5.0


def idle_of(spans_us: list[tuple[float, float]]) -> dict[str, float | int | None]:
    """Shares of the time from the first begin to the last end, of (begin, end) in microseconds:
    in which nothing ran, and that of it which lay in gaps longer than LONG_US."""
    spans_us = sorted(spans_us)
    if not spans_us:
        return {"idle_share": None, "waiting_share": None, "kernels": 0}
    gaps, until = [], spans_us[0][0]
    for start, end in spans_us:
        gaps.append(max(0.0, start - until))
        until = max(until, end)
    whole = until - spans_us[0][0]
    return {
        "idle_share": sum(gaps) / whole,
        "waiting_share": sum(gap for gap in gaps if gap > LONG_US) / whole,
        "kernels": len(spans_us),
    }
