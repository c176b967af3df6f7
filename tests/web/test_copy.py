"""What the page gives to take along: it runs, and gives the same text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from tests.servers import Server, running_server
from tests.web.conftest import Opens
from tests.web.pages import address, generated, text_of

pytestmark = pytest.mark.asyncio(loop_scope="session")
TRICKY = 'It\'s "Tom" \\ he said: $HOME `ls` \N{SNOWMAN}\nOne day'
WORDS = {"prompt": TRICKY, "max_tokens": 20, "temperature": 0.9, "top_k": 40, "shown": "text"}


async def copied(page: Page, button: str, said: str) -> str:
    await page.get_by_role("button", name=button).click()
    await expect(page.locator("#copied")).to_have_text(said)
    text: str = await page.evaluate("navigator.clipboard.readText()")
    return text


def run(command: list[str], **environment: str) -> str:
    path = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=path | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def streamed_text(events: str) -> str:
    data = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data")]
    return "".join(json.loads(one).get("text", "") for one in data[1:-1])


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
async def test_curl(server: Server, opened: Opens) -> None:
    async with opened(address(server.url, **WORDS)) as page:
        await generated(page)
        command = await copied(page, "Copy as curl", "curl command copied")
        assert streamed_text(run(["/bin/sh", "-c", command])) == await text_of(page)
        assert "authorization" not in command


async def test_python(server: Server, opened: Opens) -> None:
    async with opened(address(server.url, **WORDS)) as page:
        await generated(page)
        program = await copied(page, "Copy as Python", "Python program copied")
        printed = run([sys.executable, "-c", program], PYTHONIOENCODING="utf-8")
        assert printed == await text_of(page) + "\n"


async def test_the_link(server: Server, opened: Opens) -> None:
    async with opened(address(server.url, **WORDS)) as page:
        await generated(page)
        assert await copied(page, "Copy link", "Link copied") == page.url
        text, url = await text_of(page), page.url
    async with opened(url) as page:
        await generated(page)
        assert await text_of(page) == text


@pytest.mark.slow
async def test_with_a_key_what_is_copied_has_none_in_it(tmp_path: Path, opened: Opens) -> None:
    flags = ("--threads", "1", "--api-keys", "glass:secret-word")
    expected = ("401",)
    with running_server(tmp_path, *flags) as server:
        async with opened(address(server.url, **WORDS), expected=expected) as page:
            await page.locator("#key").fill("secret-word")
            await page.get_by_role("button", name="Open").click()
            await generated(page)
            command = await copied(page, "Copy as curl", "curl command copied")
            program = await copied(page, "Copy as Python", "Python program copied")
            assert "secret-word" not in command + program
            printed = run(["/bin/sh", "-c", command], API_KEY="secret-word")
            assert streamed_text(printed) == await text_of(page)
            printed = run(
                [sys.executable, "-c", program],
                API_KEY="secret-word",
                PYTHONIOENCODING="utf-8",
            )
            assert printed == await text_of(page) + "\n"


async def test_where_the_clipboard_is_closed(server: Server, opened: Opens) -> None:
    async with opened(address(server.url, **WORDS)) as page:
        await generated(page)
        await page.evaluate(
            "() => { navigator.clipboard.writeText = () => Promise.reject(new Error('closed')) }"
        )
        await page.get_by_role("button", name="Copy as curl").click()
        await expect(page.locator("#copy-dialog")).to_be_visible()
        assert (await page.locator("#copy-text").input_value()).startswith("curl -N 'http://")
        assert await page.locator("#copied").text_content() == ""
