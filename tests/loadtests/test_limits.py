"""The sweep of limits: what is measured is kept, and the table says what it means."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from rich.console import Console

from loadtests import limits

SPEEDS = {8: 50.0, 16: 90.0, 32: 100.0}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The values that were measured, by a bench that takes no time."""
    values: list[float] = []

    def bench(_: argparse.Namespace, value: float) -> limits.Measured:
        if len(values) == 4:
            raise KeyboardInterrupt
        values.append(value)
        times = dict.fromkeys((*limits.KEPT, "foreign_cores"), 0.01)
        return times | {"output_tokens_per_s": SPEEDS[int(value)]}

    monkeypatch.setattr(limits, "bench", bench)
    return values


def sweep(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> int:
    command = ["limits", "--limit", "max-num-seqs", "--values", "8", "16", "32", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(out), *more])
    return limits.main()


def test_an_interrupted_sweep_goes_on(
    measured: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "limits.json"
    with pytest.raises(KeyboardInterrupt):
        sweep(monkeypatch, out)
    assert measured == [8, 16, 32, 8]
    measured.clear()
    assert sweep(monkeypatch, out) == 0
    assert measured == [16, 32]
    measured.clear()
    assert sweep(monkeypatch, out) == 0
    assert measured == []
    with pytest.raises(SystemExit, match="other settings"):
        sweep(monkeypatch, out, "--users", "7")


def test_the_table_compares_within_a_round() -> None:
    """The second round was at half the speed: the shares are the same."""
    times = dict.fromkeys(limits.KEPT, 0.01)
    found = {
        str(value): [times | {"output_tokens_per_s": speed / slower} for slower in (1, 2)]
        for value, speed in SPEEDS.items()
    }
    console = Console(width=100, record=True)
    console.print(limits.table("max-num-seqs", found))
    shown = console.export_text()
    assert "90%" in shown
    assert "50%" in shown
    assert "100%" in shown
