"""Requests made from /openapi.json, right and wrong, with API keys and without.

schemathesis makes them and checks each answer: no 5xx but 503, and status, headers, media type and
body as documented; a body that breaks the schema is refused, and so is a request without its key.
Before and after, one request must give the same tokens, and law 1 must hold.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.faults.common import Json, Report, add_server_arguments, parse_counts, target

KEY = "a-key-for-the-schema-check"
# Which bodies fit depends on the loaded model too (vocabulary, context), which no schema can say.
UNCHECKED = "positive_data_acceptance"
MAX_EXAMPLES = 1000  # of one operation in one pass; more are made by more passes
MIN_EXAMPLES = 10
NUM_OPERATIONS = 5  # about so many take as many different requests as are asked for


@dataclass(slots=True)
class Found:
    """What schemathesis saw."""

    num_cases: int = 0
    seeds: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_server_arguments(parser)
    parser.add_argument("--cases", type=int, default=20_000, help="requests at least, of each kind")
    parser.add_argument("--keys", choices=("both", "on", "off"), default="both")
    parser.add_argument("--key", default=KEY, help="of a server at --url")


def run(arguments: argparse.Namespace) -> int:
    """0 when every answer is as documented."""
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    report = Report("schema")
    kinds = ("off", "on") if arguments.keys == "both" else (arguments.keys,)
    for keys in kinds:
        key = arguments.key if keys == "on" else None
        with target(arguments, *([] if key is None else ["--api-keys", f"schema:{key}"])) as server:
            before = reference_tokens(server.url, key)
            found = check(server.url, arguments.cases, seed, key)
            after = reference_tokens(server.url, key)
            counts = scrape(server.url, key)
        ended = counts["finished"] + counts["aborted"] + counts["failed"]
        report.figures[f"keys {keys}: requests"] = found.num_cases
        report.figures[f"keys {keys}: seeds"] = ", ".join(map(str, found.seeds))
        report.promises[f"keys {keys}: every answer as documented"] = not found.failures
        report.promises[f"keys {keys}: the same tokens afterwards"] = before == after
        report.promises[f"keys {keys}: accepted = ended + in flight"] = (
            counts["accepted"] == ended + counts["in_flight"]
        )
        for failure in found.failures:
            print(failure)
    return report.finish(arguments.out)


def check(url: str, num_cases: int, seed: int, key: str | None) -> Found:
    """Passes of schemathesis until there were so many cases."""
    found = Found()
    while found.num_cases < num_cases:
        # The first pass alone goes through every boundary of every field.
        phases = "coverage,fuzzing" if not found.seeds else "fuzzing"
        missing = num_cases - found.num_cases
        num_examples = max(MIN_EXAMPLES, min(MAX_EXAMPLES, missing // NUM_OPERATIONS))
        found.seeds.append(seed + len(found.seeds))
        result = one_pass(url, phases, num_examples, found.seeds[-1], key)
        cases = result["test_cases"]["generated"]  # type: ignore[index]
        found.num_cases += cases
        print(f"seed {found.seeds[-1]}: {found.num_cases:,} of {num_cases:,} cases", flush=True)
        if result["failures"] or result["errors"]:
            found.failures.append(str(result["said"]))
        if not cases or found.failures:
            break
    return found


def one_pass(url: str, phases: str, max_examples: int, seed: int, key: str | None) -> Json:
    """The JSON report of one run of schemathesis, and as `said` what it printed."""
    with tempfile.TemporaryDirectory(prefix="schema-") as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
        flags = {
            "--phases": phases,
            "--max-examples": str(max_examples),
            "--checks": "all",
            "--exclude-checks": UNCHECKED,
            "--seed": str(seed),
            "--generation-database": "none",
            "--request-timeout": "60",
            "--suppress-health-check": "all",
            "--report-json-path": str(path),
        }
        command += [word for pair in flags.items() for word in pair]
        command += ["--continue-on-failure", "--no-color", "--no-shrink"]
        if key is not None:
            command += ["--header", f"Authorization: Bearer {key}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if not path.exists():
            raise RuntimeError(f"schemathesis made no report:\n{done.stdout}\n{done.stderr}")
        result: Json = json.loads(path.read_text())
        return result | {"said": done.stdout}


def reference_tokens(url: str, key: str | None) -> object:
    """What one request always gives."""
    body = {"prompt": "Once upon a time", "max_tokens": 32, "seed": 1, "stream": False}
    with urllib.request.urlopen(_request(f"{url}/generate", key, body), timeout=60) as response:
        return json.load(response)["choices"][0]["token_ids"]


def scrape(url: str, key: str | None) -> dict[str, float]:
    """The books."""
    with urllib.request.urlopen(_request(f"{url}/metrics", key), timeout=60) as response:
        return parse_counts(response.read().decode())


def _request(url: str, key: str | None, body: Json | None = None) -> urllib.request.Request:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    if body is None:
        return urllib.request.Request(url, headers=headers)
    headers["Content-Type"] = "application/json"
    return urllib.request.Request(url, json.dumps(body).encode(), headers)
