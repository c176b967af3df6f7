"""The threads of the compiled forward: what they share, and what becomes of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from model.kernels import native
from model.kernels.packing import PackedLinear, pack
from model.linear import Linear

ROWS = torch.arange(70 * 64.0).view(70, 64).sin()
KERNELS = Path(native.__file__).parent
DRIVER = Path(__file__).with_name("team_driver.c")
IN_A_CHILD = """
import os
from tests.model.test_team import packed, product
weights = packed()
right = product(2, weights)
child = os.fork()
if child == 0:  # torch's own threads would be waited for for ever
    os._exit(0 if product(2, weights).equal(right) else 1)
assert os.waitpid(child, 0)[1] == 0
assert product(2, weights).equal(right)
"""


def packed() -> PackedLinear:
    torch.manual_seed(0)
    linear = Linear(64, 160, bias=True)
    return pack(linear, "float32")


def product(threads: int, weights: PackedLinear | None = None) -> torch.Tensor:
    """The same whatever the number of threads."""
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return (weights or packed()).product(ROWS)
    finally:
        torch.set_num_threads(usual)


def built(folder: Path, *command: str) -> Path:
    """The driver, by this compiler with these flags."""
    program = folder / "driver"
    sources = [str(DRIVER), str(KERNELS / "team.c")]
    flags = ["-std=gnu11", "-pthread", f"-I{KERNELS}"]
    subprocess.run([*command, *flags, *sources, "-o", program], check=True)
    return program


def run(program: Path, *words: str) -> None:
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


def test_what_one_writes_before_a_meeting_all_see_after_it(tmp_path: Path) -> None:
    program = built(tmp_path, "cc", "-O2")
    for size in (1, 2, 3, 5):
        run(program, str(size), "500")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the sanitizer is gcc's")
def test_nothing_is_read_before_it_is_safely_there(tmp_path: Path) -> None:
    """As above, which runs everywhere, under ThreadSanitizer."""
    program = built(tmp_path, "gcc", "-O1", "-fsanitize=thread")
    for size in (2, 3, 5):
        run(program, str(size), "500")
    run(program, "absent")


def test_who_has_no_core_is_not_waited_for(tmp_path: Path) -> None:
    run(built(tmp_path, "cc", "-O2"), "absent")


def test_any_number_of_threads_and_any_change_of_it() -> None:
    weights, right = packed(), product(1)
    for threads in (2, 1, 3, 300, 2):
        assert product(threads, weights).equal(right)


def test_two_threads_may_call_at_once() -> None:
    weights, right = packed(), product(1)
    wrong: list[int] = []

    def call() -> None:
        wrong.extend(n for n in range(50) if not product(2, weights).equal(right))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert not wrong


def test_a_child_process_has_a_team_of_its_own() -> None:
    """A fork has none of its parent's threads; to wait for them would be for ever."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", IN_A_CHILD], check=True, timeout=60)


def test_nobody_stays_awake_when_nothing_is_to_be_done() -> None:
    product(2)
    time.sleep(0.1)
    before = os.times()
    time.sleep(0.5)
    after = os.times()
    assert after.user + after.system - before.user - before.system < 0.1
