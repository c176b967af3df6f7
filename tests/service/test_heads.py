"""`vitrine heads`, as a user runs it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.service.test_commands import vitrine


@pytest.mark.slow
def test_measures_the_bundled_model(tmp_path: Path) -> None:
    out, picture = tmp_path / "heads.json", tmp_path / "heads.png"
    arguments = ["--max-texts", "2", "--max-tokens", "40", "--out", str(out)]
    answer = vitrine("heads", *arguments, "--picture", str(picture))
    assert answer.returncode == 0, answer.stderr
    assert "2 texts, 80 tokens; 540 sentences with pronouns" in answer.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(out.read_text())
    assert found["model"] == "stories"
    previous = found["scores"]["previous"]
    assert [len(layer) for layer in previous["heads"]] == [8] * 5
    assert all(0 <= share <= 1 for layer in previous["heads"] for share in layer)
    assert previous["num_queries"] == 2 * 39


def test_what_is_no_text_is_said(tmp_path: Path) -> None:
    empty, broken = tmp_path / "empty.txt", tmp_path / "broken.txt"
    empty.write_text("\n")
    broken.write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"once upon a time")[:12])
    for name, message in (
        ("empty.txt", "there is no text in it"),
        ("broken.txt", "can't decode byte"),
        ("cut.txt.gz", "end-of-stream"),
        ("missing.txt", "No such file"),
    ):
        answer = vitrine("heads", "--text", str(tmp_path / name))
        assert answer.returncode == 1
        assert answer.stderr.startswith("vitrine heads: ")
        assert message in answer.stderr
        assert len(answer.stderr.splitlines()) == 1


def test_a_picture_of_another_kind_is_refused() -> None:
    answer = vitrine("heads", "--picture", "heads.gif")
    assert answer.returncode == 1
    assert "heads.gif: .png and .svg are drawn" in answer.stderr
