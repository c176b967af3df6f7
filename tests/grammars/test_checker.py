"""The worker process: real ones, with grammars that take too long, too much, or kill it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from model.checkpoint_files import bundled_checkpoint
from model.grammar_spec import GrammarSpec
from service.grammars import GrammarError
from service.grammars.checker import CheckerBusyError, CheckLimits, GrammarChecker
from tests.api.fake_engine import INFO

BUNDLED = msgspec.structs.replace(INFO, vocab_size=4096, eos_token_ids=[0])
GOOD = GrammarSpec("regex", "[a-z]+")
SLOW = GrammarSpec("json_schema", '{"type":"integer","multipleOf":999983}')  # 8 s, 360 MB
DEEP = GrammarSpec(  # overflows the stack
    "lark",
    "start: r0\n"
    + "\n".join(f'r{i}: r{i + 1} r{i + 1} | "a"' for i in range(3000))
    + '\nr3000: "b"',
)
Checkers = Callable[..., GrammarChecker]


@pytest.fixture
async def checker() -> AsyncIterator[Checkers]:
    made: list[GrammarChecker] = []

    def make(**limits: Any) -> GrammarChecker:
        made.append(GrammarChecker(bundled_checkpoint, CheckLimits(**limits)))
        return made[-1]

    yield make
    for one in made:
        await one.close()
    assert workers() == []


def workers() -> list[psutil.Process]:
    children = psutil.Process().children()  # not those of servers that other tests keep
    return [child for child in children if "service.grammars.worker" in child.cmdline()]


async def refusal(checker: GrammarChecker, spec: GrammarSpec) -> str:
    with pytest.raises(GrammarError) as error:
        await checker.check(spec, BUNDLED)
    return str(error.value)


async def test_what_compiles_passes_and_what_does_not_is_refused(checker: Checkers) -> None:
    one = checker()
    await one.check(GOOD, BUNDLED)
    assert "unclosed group" in await refusal(one, GrammarSpec("regex", "("))
    await one.check(GrammarSpec("json_schema", '{"type":"object"}'), BUNDLED)
    assert len(workers()) == 1


async def test_one_that_takes_too_long_is_refused_and_the_next_is_not(checker: Checkers) -> None:
    one = checker(cpu_s=0.3)
    assert await refusal(one, SLOW) == "it takes more than 0.3 s to compile"
    await one.check(GOOD, BUNDLED)


async def test_one_that_takes_too_much_memory_is_refused(checker: Checkers) -> None:
    one = checker(cpu_s=100.0, memory_bytes=200 * 2**20)
    assert "within 200 MiB" in await refusal(one, SLOW)
    await one.check(GOOD, BUNDLED)


async def test_one_that_kills_the_worker_is_refused(checker: Checkers) -> None:
    one = checker()
    assert "too deep" in await refusal(one, DEEP)
    await one.check(GOOD, BUNDLED)


async def test_a_machine_without_time_is_no_reason_to_wait_for_ever(checker: Checkers) -> None:
    one = checker(cpu_s=100.0, wall_s=0.0)
    assert await refusal(one, SLOW) == "it was not compiled within 0 s"
    assert workers() == []


async def test_verdicts_are_kept_and_the_oldest_go_first(checker: Checkers) -> None:
    one = checker(max_verdicts=2)
    bad = GrammarSpec("regex", "(")
    await one.check(GOOD, BUNDLED)
    await refusal(one, bad)
    await one.close()
    await one.check(GOOD, BUNDLED)
    await refusal(one, bad)
    assert workers() == [], "both were known"
    await one.check(GrammarSpec("regex", "b"), BUNDLED)
    await one.close()
    await refusal(one, bad)
    assert workers() == []
    await one.check(GOOD, BUNDLED)
    assert len(workers()) == 1, "the first one was forgotten"


async def test_only_so_many_wait(checker: Checkers) -> None:
    one = checker(max_waiting=3)
    checks = [
        asyncio.create_task(one.check(GrammarSpec("regex", f"a{i}"), BUNDLED)) for i in range(5)
    ]
    results = await asyncio.gather(*checks, return_exceptions=True)
    assert [type(result) for result in results[:3]] == [type(None)] * 3
    assert all(isinstance(result, CheckerBusyError) for result in results[3:])
    assert "the limit is 3" in str(results[4])
    await one.check(GrammarSpec("regex", "a4"), BUNDLED)


async def test_the_same_grammar_is_tried_once(checker: Checkers) -> None:
    one = checker(cpu_s=0.5)
    began = time.process_time()
    answers = await asyncio.gather(
        *(one.check(SLOW, BUNDLED) for _ in range(8)), return_exceptions=True
    )
    assert {str(answer) for answer in answers} == {"it takes more than 0.5 s to compile"}
    assert workers() == [], "the one worker ended with the one try"
    assert time.process_time() - began < 2, "the event loop does not wait for it"


async def test_a_check_that_is_given_up_leaves_no_answer_for_the_next(checker: Checkers) -> None:
    one = checker()
    await one.check(GOOD, BUNDLED)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(one.check(SLOW, BUNDLED), 0.1)
    assert "unclosed group" in await refusal(one, GrammarSpec("regex", "("))


async def test_a_worker_that_cannot_start_is_the_servers_fault(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = GrammarChecker(lambda: tmp_path)
    with pytest.raises(RuntimeError, match="ended with status 1"):
        await one.check(GOOD, BUNDLED)
    assert "TokenizerError" in capfd.readouterr().err


async def test_the_worker_ends_with_its_parent(checker: Checkers) -> None:
    """Its standard input closes, however the parent ended."""
    one = checker()
    await one.check(GOOD, BUNDLED)
    (worker,) = workers()
    assert one._worker is not None
    assert one._worker.stdin is not None
    one._worker.stdin.close()
    await asyncio.to_thread(psutil.wait_procs, [worker], 5)
    assert not worker.is_running()
