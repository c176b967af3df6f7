"""Requests made from /openapi.json against real servers; `python -m loadtests.faults schema` makes
many more."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.faults.schema import KEY, check, reference_tokens
from tests.servers import Server, running_server

SEED = 20261121
CASES = 300


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_answer_is_as_documented(server: Server) -> None:
    before = reference_tokens(server.url, None)
    found = check(server.url, CASES, SEED, None)
    assert not found.failures, "\n".join(found.failures)
    assert found.num_cases >= CASES
    assert reference_tokens(server.url, None) == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_answer_is_as_documented_behind_a_key(tmp_path: Path) -> None:
    flags = ("--threads", "1", "--api-keys", f"schema:{KEY}")
    with running_server(tmp_path, *flags) as server:
        found = check(server.url, CASES, SEED + 1, KEY)
        log = server.log.read_text()
    assert not found.failures, "\n".join(found.failures)
    assert found.num_cases >= CASES
    assert "Traceback" not in log
    assert KEY not in log
