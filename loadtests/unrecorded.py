"""A server that records no metric, for loadtests.metrics_cost alone: it measures what that saves.

`python -m loadtests.unrecorded serve ...` is the server, `python -m loadtests.unrecorded ENDPOINT`
its engine process.
"""

from __future__ import annotations

import sys
from typing import Any

from service import engine_process
from service.buckets import Distribution
from service.engine_record import EngineRecord
from service.metric_recording import Metrics

RECORDERS = {
    Distribution: ("observe",),
    EngineRecord: ("stepped",),
    Metrics: (
        "accepted",
        "began",
        "ended",
        "generated",
        "http_began",
        "http_ended",
        "rejected",
        "sequence_began",
        "sequence_ended",
    ),
}


def nothing(*_: Any, **__: Any) -> None:
    """In place of a recorder."""


def main() -> int:
    if sys.argv[1] == "serve":
        for owner, names in RECORDERS.items():
            for name in names:
                setattr(owner, name, nothing)
        engine_process.ENGINE_MODULE = "loadtests.unrecorded"
        from service import cli

        return int(cli.main() or 0)
    from service.engine import loop
    from service.engine.core import EngineCore
    from service.engine.traffic import Traffic

    Traffic.step = Traffic.decode = lambda *_: (0.0, 0.0)  # type: ignore[method-assign]
    EngineCore.step_record = nothing  # type: ignore[method-assign]
    return loop.main()


if __name__ == "__main__":
    raise SystemExit(main())
