"""Peak resident memory of the engine process, beside what its weights and its KV cache need.

    python -m loadtests.memory --model DIR --dtype bfloat16 --kv-cache-gb 1

Starts a server, fills its cache with prompts, and reads VmHWM from /proc (Linux). The goal is
weights + KV cache + 600 MB at most.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import urllib.request
from pathlib import Path

from loadtests.faults.common import add_server_arguments, target
from loadtests.peers.streams import Json, read_all
from loadtests.served import understand

MB = 1e6
GOAL_MB = 600


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.memory", description=__doc__)
    add_server_arguments(parser)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-cache-gb", default="1")
    given = parser.parse_args()
    flags = ["--dtype", given.dtype, "--kv-cache-gb", given.kv_cache_gb]
    flags += [] if given.model is None else ["--model", given.model]
    with target(given, *flags) as server:
        with urllib.request.urlopen(f"{server.url}/info", timeout=10) as answer:
            info = json.load(answer)
        rng = random.Random(0)
        length = min(480, info["context_length"] - 8)
        bodies: list[Json] = [
            {
                "prompt": [rng.randrange(1, info["vocab_size"]) for _ in range(length)],
                "max_tokens": 2,
                "ignore_eos": True,
            }
            for _ in range(info["kv_cache"]["tokens"] // length + 1)
        ]
        for start in range(0, len(bodies), 64):
            read_all(f"{server.url}/generate", bodies[start : start + 64], understand)
        engine = server.engine()
        if engine is None:
            raise SystemExit("there is no engine to look at")
        status = Path(f"/proc/{engine.pid}/status").read_text()
        high = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        peak = int(high.split()[1]) * 1024
    needed = info["kv_cache"]["bytes"] + info["weight_bytes"]
    over = (peak - needed) / MB
    print(
        f"{shlex.join(flags)}: peak {peak / MB:,.0f} MB; weights {info['weight_bytes'] / MB:,.0f}, "
        f"KV cache {info['kv_cache']['bytes'] / MB:,.0f}; {over:,.0f} MB over both, goal {GOAL_MB}"
    )
    return 0 if over <= GOAL_MB else 1


if __name__ == "__main__":
    raise SystemExit(main())
