"""SECURITY.md names a test for each promise: they must exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_test_that_it_names_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    promised = text.partition("## What is promised")[2].partition("## What is not promised")[0]
    path = ""
    named = re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", promised)
    assert len(named) > 20
    for file, name in named:
        path = file or path
        source = (ROOT / path).read_text()
        assert not name or f"def {name}(" in source, f"{path}::{name}"
    for promise in re.split(r"^- ", promised, flags=re.MULTILINE)[1:]:
        assert "`tests/" in promise or "loadtests" in promise, promise
