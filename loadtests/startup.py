"""Seconds from starting `vitrine serve` to its first answers.

    python -m loadtests.startup

Each round starts a server, and prints when /health/live answered, when /health/ready did,
and when the first token of a stream arrived.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import urllib.request

PORT = 8199
BODY = b'{"prompt": "Once upon a time", "seed": 1, "max_tokens": 16}'
LIMIT_S = 120.0


def when_answered(path: str, began: float) -> float:
    """Seconds until a GET of `path` succeeds."""
    while time.monotonic() - began < LIMIT_S:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=5):
                return time.monotonic() - began
        except OSError:
            time.sleep(0.01)
    raise TimeoutError(f"{path} did not answer in {LIMIT_S} s")


def first_token(began: float) -> float:
    """Seconds until the first token event of a stream."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/generate", BODY, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        for line in response:
            if line.startswith(b"event: token"):
                return time.monotonic() - began
    raise RuntimeError("the stream had no token")


def main() -> None:
    """Measure and print medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("flags", nargs="*", help="flags for vitrine serve, after --")
    arguments = parser.parse_args()
    rows = []
    for _ in range(arguments.rounds):
        began = time.monotonic()
        command = [sys.executable, "-m", "service", "serve", "--port", str(PORT)]
        server = subprocess.Popen([*command, *arguments.flags], stderr=subprocess.DEVNULL)
        try:
            row = (
                when_answered("/health/live", began),
                when_answered("/health/ready", began),
                first_token(began),
            )
        finally:
            server.terminate()
            server.wait(30)
        rows.append(row)
        print("live {:.2f} s, ready {:.2f} s, first token {:.2f} s".format(*row))
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print("median: live {:.2f} s, ready {:.2f} s, first token {:.2f} s".format(*medians))


if __name__ == "__main__":
    main()
