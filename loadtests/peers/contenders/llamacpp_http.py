"""llama-server under concurrent streams of POST /completion, continuous batching on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from loadtests.peers.contenders.servers import HOST, load, running
from loadtests.peers.folder import Folder
from loadtests.peers.streams import Json, Seen
from loadtests.peers.work import Measurement, PeerError, Work, serve_work

PROGRAM = "llama-server"


def measure(work: Work) -> Iterator[Measurement]:
    """Every batch through one server with as many slots as the largest batch."""
    folder = Folder(Path(work.folder))
    slots = max(work.batches)
    room = slots * (work.prompt_tokens + work.output_tokens + 16)

    def command(port: int) -> list[str]:
        settings = {
            "-m": str(folder.gguf(work.shape, work.dtype)),
            "-t": str(work.threads),
            "-np": str(slots),
            "-c": str(room),
            "-fa": "on",
            "--host": HOST,
            "--port": str(port),
        }
        words = [word for pair in settings.items() for word in pair]
        return [str(folder.llamacpp_program(PROGRAM)), *words, "--no-webui"]

    log = folder.logs / "llama-server.txt"
    with running(command, log, dict(os.environ), ready="/health") as url:
        yield from load(work, f"{url}/completion", _body, _understand)


def _body(prompt: list[int], output_tokens: int) -> Json:
    return {
        "prompt": prompt,
        "n_predict": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": False,
        "return_tokens": True,
    }


def _understand(event: Json) -> Seen:
    match event:
        case {"error": {"message": message}}:
            raise PeerError(f"the server says: {message}")
        case {"stop": True, "tokens_predicted": int(total)}:
            return Seen(total=total)
        case {"tokens": [*token_ids]} if token_ids:
            return Seen(token_ids=tuple(token_ids))  # type: ignore[arg-type]
        case {"content": str(content)} if content:
            return Seen(num_unnamed=1)
    return Seen()


if __name__ == "__main__":
    serve_work(measure)
