"""`vitrine serve` under concurrent streams of POST /generate."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from loadtests.peers.contenders.servers import HOST, load, running
from loadtests.peers.folder import Folder
from loadtests.peers.streams import Json, Seen
from loadtests.peers.work import Measurement, PeerError, Work, serve_work

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


def measure(work: Work) -> Iterator[Measurement]:
    """Every batch through one server with its default settings."""

    def command(port: int) -> list[str]:
        settings = {
            "--host": HOST,
            "--port": str(port),
            "--model": work.checkpoint,
            "--dtype": DTYPES[work.dtype],
            "--device": "cpu",
            "--threads": str(work.threads),
        }
        serve = [sys.executable, "-m", "service", "serve"]
        return serve + [word for pair in settings.items() for word in pair]

    log = Folder(Path(work.folder)).logs / "vitrine-serve.txt"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VITRINE_")}
    with running(command, log, environment, ready="/health/ready") as url:
        yield from load(work, f"{url}/generate", _body, _understand)


def _body(prompt: list[int], output_tokens: int) -> Json:
    return {
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


def _understand(event: Json) -> Seen:
    match event:
        case {"usage": {"completion_tokens": int(total)}}:
            return Seen(total=total)
        case {"token_ids": list(token_ids)}:
            return Seen(token_ids=tuple(token_ids))
        case {"status": _, "detail": detail}:
            raise PeerError(f"the server says: {detail}")
    return Seen()


if __name__ == "__main__":
    serve_work(measure)
