"""What a short request costs the API process: `python -m loadtests.request_cost --rounds 5`.

Requests of one token, 32 at once again and again; processor time of the API over their number. A
directory with a `sitecustomize.py` in PYTHONPATH (one that says `gc.disable()`, say) shows what a
change would be worth.
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median

from loadtests.faults.common import add_server_arguments, target
from loadtests.peers.streams import read_all
from loadtests.served import understand

AT_ONCE = 32


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.request_cost", description=__doc__)
    add_server_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round")
    given = parser.parse_args()
    costs = []
    with target(given) as server:
        if server.api is None:
            raise SystemExit("request_cost starts a server of its own: it reads its process's time")
        ask(f"{server.url}/generate", 1.0)  # warm
        for number in range(given.rounds):
            before = sum(server.api.cpu_times()[:2])
            count = ask(f"{server.url}/generate", given.seconds)
            costs.append(1e3 * (sum(server.api.cpu_times()[:2]) - before) / count)
            print(f"round {number + 1}: {count} requests, {costs[-1]:.3f} ms each", flush=True)
    print(f"median {median(costs):.3f} ms of processor time a request")


def ask(url: str, seconds: float) -> int:
    """Send requests for so long; how many were answered."""
    until, count = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        prompts = [[random.randrange(1, 4000) for _ in range(16)] for _ in range(AT_ONCE)]
        bodies: list[dict[str, object]] = [
            {"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
            for prompt in prompts
        ]
        read_all(url, bodies, understand, look_every_s=0.001)
        count += AT_ONCE
    return count


if __name__ == "__main__":
    main()
