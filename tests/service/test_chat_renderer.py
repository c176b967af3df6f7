"""The process that runs chat templates: what a hostile one cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

from model.chat_template import ChatTemplate, ChatTemplateError
from service.chat_renderer import ChatBusyError, ChatRenderer
from service.template_worker import Render, Start, framed

TALK = [{"role": "user", "content": "Hi"}]
PLAIN = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
# Forever when the message says so.
TOUCHY = (
    "{% if messages[0].content == 'loop' %}"
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}{% endif %}"
    "{{ messages[0].content }}"
)
LOOP = [{"role": "user", "content": "loop"}]


@asynccontextmanager
async def renderer(source: str, **limits: Any) -> AsyncIterator[ChatRenderer]:
    made = ChatRenderer(ChatTemplate(source, {"bos_token": "<s>"}), **limits)
    try:
        yield made
    finally:
        await made.close()


async def test_many_at_once_each_get_their_own() -> None:
    async with renderer(PLAIN) as chats:
        talks = [[{"role": "user", "content": f"{n} é 東京 \U0001f600"}] for n in range(200)]
        texts = await asyncio.gather(*[chats.render(talk) for talk in talks])
        assert texts == ["<s>" + talk[0]["content"] for talk in talks]


async def test_a_long_conversation() -> None:
    async with renderer(PLAIN, time_limit_s=30) as chats:
        text = "é\n" * 2_000_000
        assert await chats.render([{"role": "user", "content": text}]) == "<s>" + text


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{{ '%1000000000d' % 1 }}", "memory"),
        ("{{ 'a'.center(10**9) }}", "memory"),
        (
            "{% set ns = namespace(x='aaaaaaaaaa') %}"
            "{% for i in range(100000) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "memory",
        ),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}", "more than 8388608"),
        ("{{ '\\ud800' }}", "no valid Unicode"),
        ("{% if %}", "line 1"),
        ("{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}", "RecursionError"),
    ],
)
async def test_a_template_that_takes_too_much_is_refused(source: str, words: str) -> None:
    async with renderer(source, time_limit_s=5) as chats:
        for _ in range(2):  # and so is the next try
            with pytest.raises(ChatTemplateError, match=words):
                await chats.render(TALK)


async def test_a_template_that_is_never_compiled_is_refused() -> None:
    """Jinja computes constants while it compiles."""
    async with renderer("{{ 9 ** (9 ** 9) }}", time_limit_s=0.5) as chats:
        with pytest.raises(ChatTemplateError, match="its process ended"):
            await chats.render(TALK)


async def test_one_that_takes_too_long_is_killed_and_the_next_goes_on() -> None:
    async with renderer(TOUCHY, time_limit_s=1) as chats:
        assert await chats.render(TALK) == "Hi"
        assert chats.worker_pid is not None
        worker = psutil.Process(chats.worker_pid)
        slow = asyncio.create_task(chats.render(LOOP))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(chats.render(TALK))
        with pytest.raises(ChatTemplateError, match="did not finish within 1 s"):
            await slow
        assert await waiting == "Hi"
        assert not worker.is_running()


async def test_who_waits_too_long_for_a_turn_is_told_to_come_again() -> None:
    async with renderer(TOUCHY, time_limit_s=3, wait_limit_s=0.1) as chats:
        await chats.check()
        slow = asyncio.create_task(chats.render(LOOP))
        await asyncio.sleep(0)
        with pytest.raises(ChatBusyError, match="no turn"):
            await chats.render(TALK)
        with pytest.raises(ChatTemplateError):
            await slow


async def test_an_answer_that_nobody_waits_for_is_not_given_to_another() -> None:
    async with renderer(TOUCHY, time_limit_s=5) as chats:
        await chats.check()
        left = asyncio.create_task(chats.render(LOOP))
        await asyncio.sleep(0.1)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert await chats.render(TALK) == "Hi"


async def test_a_worker_that_died_between_two_chats_is_replaced() -> None:
    async with renderer(PLAIN) as chats:
        await chats.check()
        assert chats.worker_pid is not None
        os.kill(chats.worker_pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(chats.worker_pid)], timeout=5)
        texts = []
        for _ in range(20):  # the first may find it dead before asyncio has heard of it
            with contextlib.suppress(ChatTemplateError):
                texts.append(await chats.render(TALK))
        assert texts[:1] == ["<s>Hi"]
        assert len(texts) >= 19


def test_the_worker_ends_by_itself_when_nobody_is_there_to_kill_it() -> None:
    """The API process may die while a template loops: then the kernel's alarm ends it."""
    command = [sys.executable, "-m", "service.template_worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        worker.stdin.write(framed(Start(TOUCHY, {}, time_limit_s=0.3)) + framed(Render(LOOP)))
        worker.stdin.close()
        assert worker.wait(20) == -signal.SIGALRM


async def test_the_worker_has_no_part_of_the_environment_that_could_be_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    async with renderer(PLAIN) as chats:
        await chats.check()
        assert chats.worker_pid is not None
        assert "HF_TOKEN" not in psutil.Process(chats.worker_pid).environ()
