"""The log: one shape for every logger, one line an event, and nothing of what was said."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service import logs
from tests.servers import running_server


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_of_every_logger() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    logging.getLogger("a.library").info("Started on %s", "here")
    logging.getLogger("vitrine.engine").warning("slow", extra={"seconds": 1.5})
    logging.getLogger("vitrine").debug("not at this level")
    first, second = lines(stream)
    assert (first["logger"], first["level"], first["event"]) == (
        "a.library",
        "info",
        "Started on here",
    )
    assert (second["level"], second["seconds"]) == ("warning", 1.5)
    assert second["timestamp"].endswith("Z")


@pytest.mark.parametrize("format_", ["json", "console"])
def test_a_traceback_shows_no_values(format_: logs.LogFormat) -> None:
    stream = io.StringIO()
    logs.configure("info", format_, stream)
    prompt = "".join(reversed("sdrow nwo s'tneilc a"))
    try:
        raise RuntimeError(f"{len(prompt)} characters")
    except RuntimeError:
        logging.getLogger("vitrine").exception("failed")
    assert "RuntimeError: 20 characters" in stream.getvalue()
    assert prompt not in stream.getvalue()


@pytest.mark.parametrize("format_", ["json", "console"])
@pytest.mark.parametrize("end", ["\n", "\r", "\x1b[2J", "\x85", "\u2028", "\0"])
def test_nobody_writes_a_line_of_his_own(format_: logs.LogFormat, end: str) -> None:
    stream = io.StringIO()
    logs.configure("info", format_, stream)
    logging.getLogger("vitrine").info("from %s", f"a{end}level=error", extra={"id": f"b{end}c"})
    text = stream.getvalue()
    assert len(text.splitlines()) == 1
    assert end not in text.rstrip("\n")


def test_a_server_logs_json_and_never_the_words(tmp_path: Path) -> None:
    """Both processes, from start to end."""
    keys = tmp_path / "keys"
    keys.write_text("alice:a-secret-of-alice\n")
    with running_server(tmp_path, "--api-key-file", str(keys), "--threads", "1") as server:
        headers = {"authorization": "Bearer a-secret-of-alice"}
        body = {"prompt": "Zanzibar's lighthouse", "max_tokens": 8, "seed": 1, "stream": False}
        answer = httpx2.post(f"{server.url}/generate", json=body, headers=headers, timeout=60)
        text = answer.json()["choices"][0]["text"]
        httpx2.post(f"{server.url}/generate", json=body, timeout=60)
        assert server.stop() == 0
        log = server.log.read_text()
    found = [json.loads(line) for line in log.splitlines()]
    requests = [line for line in found if line["event"] == "request"]
    assert [(line["key"], line["status"]) for line in requests] == [("alice", 200), (None, 401)]
    assert requests[0]["completion_tokens"] == 8
    assert "uvicorn.error" in {line["logger"] for line in found}
    for secret in ("Zanzibar", text.strip(), "a-secret-of-alice"):
        assert secret not in log
