"""The other commands, as a user runs them: in a pipe, wrong, and interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def vitrine(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("model", "numbers"),
    [
        ("gpt2", ["49,152", "7,077,888", "124,439,808"]),
        ("llama-2-7b", ["4,096", "524,288", "6,738,415,616"]),
    ],
)
def test_inspect_prints_whole_numbers_into_a_pipe(model: str, numbers: list[str]) -> None:
    answer = vitrine("inspect", "--model", model)
    assert answer.returncode == 0, answer.stderr
    for number in numbers:
        assert number in answer.stdout
    assert "\N{HORIZONTAL ELLIPSIS}" not in answer.stdout, "a cell was cut short"


def test_generate_continues_the_prompt_and_the_seed_decides() -> None:
    arguments = ("generate", "Once upon a time", "--seed", "7", "--max-tokens", "20")
    first, again = vitrine(*arguments), vitrine(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Once upon a time")
    assert len(first.stdout) > 40
    assert again.stdout == first.stdout
    assert "seed 7; 20 tokens" in first.stderr


def test_generate_ends_before_a_stop_string() -> None:
    answer = vitrine("generate", "Once upon a time", "--temperature", "0", "--stop", ".")
    assert answer.returncode == 0
    assert "." not in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--stop", ""], "--stop"),
        (["generate", "a", "--temperature", "3"], "--temperature '3'"),
        (["generate", "a", "--model", "no/such/dir"], "no/such/dir"),
        (["generate", "a " * 600], "context"),
        (["generate", "a", "--max-tokens", "512"], "the context has 512"),
        (["inspect", "--model", "gpt5"], "gpt5"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str) -> None:
    answer = vitrine(*arguments)
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert message in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr


def test_an_unknown_command_shows_the_known_ones() -> None:
    answer = vitrine("serv")
    assert answer.returncode == 2
    assert "there is no command 'serv'" in answer.stderr
    assert "generate" in answer.stderr


def test_ctrl_c_ends_a_story_with_what_is_there(tmp_path: Path) -> None:
    output = tmp_path / "story.txt"
    command = [sys.executable, "-m", "service", "generate", "Once", "--max-tokens", "500"]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(output.read_bytes()) < 20 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode in (0, 130)  # 0: the story was over by then
    assert b"Traceback" not in errors
    assert b"tokens/s" in errors
    assert output.read_text().startswith("Once")
