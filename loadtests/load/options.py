"""The command line that Locust gets beside its own; all of it is in the web UI too."""

from __future__ import annotations

import argparse
from pathlib import Path

from locust import events

from loadtests.load.workloads import KINDS, Lengths

PATTERNS = ("constant", "steps", "burst", "soak", "poisson")


@events.init_command_line_parser.add_listener
def add_options(parser: argparse.ArgumentParser) -> None:
    """Lengths are in tokens (chats: words of a turn), times in seconds."""
    add = parser.add_argument
    add("--workload", choices=KINDS, default="fixed", help="see workloads.py")
    add("--prompt-len", type=int, default=64, help="tokens; the median if mixed")
    add("--output-len", type=int, default=64, help="tokens; the median if mixed")
    add("--shared-len", type=int, default=256, help="of the shared system prompt")
    add("--turns", type=int, default=4, help="of one chat")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--load-seed", type=int, default=0, help="of prompts and arrivals")
    add("--api-key", default="", help="if the server asks for one", is_secret=True)
    add("--think-s", type=float, default=0.0, help="a user's mean pause between two requests")
    add("--pattern", choices=PATTERNS, default="constant", help="see patterns.py")
    add("--step-users", default="1,4,16,64", help="steps: users of each")
    add("--step-s", type=float, default=15.0, help="steps: length of each")
    add("--burst-users", type=int, default=64, help="burst: users beside --users")
    add("--burst-s", type=float, default=5.0, help="burst: length")
    add("--burst-every-s", type=float, default=20.0, help="burst: period")
    add("--rate", type=float, default=4.0, help="poisson: requests/s")
    add("--dispatchers", type=int, default=1, help="poisson: that share the rate; one a worker")
    add("--samples", default="", help="folder for raw samples, a JSON line a stream")


def lengths_of(options: argparse.Namespace) -> Lengths:
    """The workload's lengths."""
    return Lengths(options.prompt_len, options.output_len, options.shared_len, options.turns)


def samples_folder(options: argparse.Namespace) -> Path | None:
    """Where raw samples go, if anywhere."""
    return Path(options.samples) if options.samples else None
