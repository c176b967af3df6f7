"""`vitrine report` with everything it measures cut down to some twenty seconds.

python -m tests.loadtests.tiny_report --out DIR --model stories --device cpu
"""

from __future__ import annotations

from dataclasses import replace

from loadtests.load.statistics import Slo
from loadtests.report import __main__ as report
from loadtests.report.plan import Mode, quick


def tiny(slo: Slo) -> Mode:
    """Two users at most, two rates, two seconds each."""
    mode = quick(slo)
    traffic = replace(
        mode.traffic, output_len=8, users=(1, 2), rate_shares=(0.3, 0.6), closed_s=2, open_s=2
    )
    return replace(
        mode,
        batches=(1,),
        bench_output_len=8,
        where_batches=(1,),
        traffic=replace(traffic, probes=0),
    )


if __name__ == "__main__":
    report.MODES["quick"] = tiny
    raise SystemExit(report.main())
