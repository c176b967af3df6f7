"""The pages under docs/ say what the code says."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WALK = ROOT / "docs" / "from-the-equation-to-the-code.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    for link in links:
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_names_on_the_walk_are_in_the_files_beside_them() -> None:
    """A `name` stands in one of the files that the page links to."""
    page = re.sub(r"```.*?```", "", WALK.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(\.\./([^)]+)\)", page)
    text = "".join((ROOT / link).read_text() for link in links)
    names = [
        name
        for name in re.findall(r"`([a-z_]+|[A-Z]\w+)`", page)
        if "_" in name or name[0].isupper()
    ]
    assert len(names) >= 25
    for name in names:
        assert re.search(rf"\b{name}\b", text), f"{name} is in no file that is linked"


def test_the_equation_is_quoted_as_it_stands() -> None:
    quoted = re.findall(r"```python\n(scores = .*?)```", WALK.read_text(), re.DOTALL)
    code = [line.strip() for line in (ROOT / "model/attention.py").read_text().splitlines()]
    assert len(quoted) == 1
    lines = [line.strip() for line in quoted[0].splitlines()]
    start = code.index(lines[0])
    assert code[start : start + len(lines)] == lines


def test_the_program_on_the_walk_prints_what_it_says() -> None:
    program, printed = re.findall(
        r"```python\n(import torch.*?)```\n\nprints\n\n```\n(.*?)```", WALK.read_text(), re.DOTALL
    )[0]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, str(WALK), "exec"), {})
    assert out.getvalue() == printed


@pytest.mark.slow
def test_the_figures_are_made_by_the_command_beside_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "model.explain.figures", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    made = {path.name for path in tmp_path.iterdir()} | {"heads.png"}  # tests/service/test_heads.py
    shown = set(re.findall(r"\]\(figures/([^)]+)\)", WALK.read_text()))
    assert shown == made
    playground = {"playground.png", "stream.gif"}  # tests/web/pictures.py
    assert made | playground == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
