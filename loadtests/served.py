"""What HTTP leaves of the engine's speed: streams through a server, beside the engine alone.

    python -m loadtests.served --streams 32 --rounds 5

Both run the bundled model (or --model) with the same prompts' length and number of tokens, one
after the other, in every round; the ratio of a round is what a busy machine disturbs least.
`--serve "--max-events-s 1e9"` gives the server more flags.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from loadtests.faults.common import add_server_arguments, target
from loadtests.peers.streams import Seen, read_all

LOOK_EVERY_S = 0.1  # the client is to cost nothing: it has the server's own cores
Json = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.served", description=__doc__)
    add_server_arguments(parser)
    parser.add_argument("--model", help="of both; without it, the bundled one")
    parser.add_argument("--threads", type=int, help="of the engine; without it, torch's choice")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--seats", type=int, help="max-num-seqs of both")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = [] if given.model is None else ["--model", given.model]
    model += [] if given.seats is None else ["--max-num-seqs", str(given.seats)]
    model += [] if given.threads is None else ["--threads", str(given.threads)]
    ratios: list[float] = []
    with target(given, *model) as server:
        served(server.url, given)  # warm
        for number in range(given.rounds):
            alone, through = offline(given, model), served(server.url, given)
            ratios.append(through / alone)
            print(
                f"round {number + 1}: engine alone {alone:.0f} tokens/s, served {through:.0f}, "
                f"ratio {ratios[-1]:.2f}",
                flush=True,
            )
    print(f"median ratio {median(ratios):.2f}")
    if given.out is not None:
        given.out.write_text(json.dumps({"streams": given.streams, "ratios": ratios}) + "\n")


def offline(given: argparse.Namespace, model: list[str]) -> float:
    """Tokens a second of `vitrine bench`, from the first prompt to the last token."""
    sizes = {"batch": given.streams, "prompt-len": given.prompt_len, "output-len": given.output_len}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "service", "bench", *flags, *model, "--repeat", "1"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("VITRINE_")}
        subprocess.run(
            [*command, "--json", str(out)], check=True, capture_output=True, env=environment
        )
        found = json.loads(out.read_text())["measurements"][0]["median"]
    return float(found["output_tokens_per_s"])


def served(url: str, given: argparse.Namespace) -> float:
    """The same of as many streams at once."""
    rng = random.Random()
    bodies: list[Json] = [
        {
            # Others each time: nothing is found in the cache, as for the engine alone.
            "prompt": [rng.randrange(1, 4000) for _ in range(given.prompt_len)],
            "max_tokens": given.output_len,
            "temperature": 0,
            "ignore_eos": True,
        }
        for number in range(given.streams)
    ]
    began, streams = read_all(f"{url}/generate", bodies, understand, look_every_s=LOOK_EVERY_S)
    num_tokens = sum(len(stream.token_ids) for stream in streams)
    if num_tokens != given.streams * given.output_len:
        raise RuntimeError(f"{num_tokens} tokens came; {given.streams} x {given.output_len} should")
    return num_tokens / (max(stream.ended for stream in streams) - began)


def understand(event: Json) -> Seen:
    """The token ids of a token event."""
    match event:
        case {"token_ids": list(token_ids)}:
            return Seen(token_ids=tuple(token_ids))
    return Seen()


if __name__ == "__main__":
    main()
