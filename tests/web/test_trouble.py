"""What goes wrong is said, and what can be done about it is offered."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from playwright.async_api import expect

from tests.servers import Server, running_server
from tests.web.conftest import Opens
from tests.web.pages import STORY, address, explained, generated, text_of

pytestmark = pytest.mark.asyncio(loop_scope="session")
KEYS = ("--threads", "1", "--api-keys", "glass:secret-word")


@pytest.mark.slow
async def test_the_door_opens_to_a_key(tmp_path: Path, opened: Opens) -> None:
    with running_server(tmp_path, *KEYS) as server:
        url = address(server.url, prompt=STORY, seed=4, max_tokens=12, shown="text")
        async with opened(url, expected=("401",)) as page:
            await expect(page).to_have_title("Vitrine")
            await page.locator("#key").fill("another")
            await page.get_by_role("button", name="Open").click()
            await expect(page.locator("#said")).to_have_text("The server does not know this key.")
            await page.locator("#key").fill("secret-word")
            await page.keyboard.press("Enter")
            await generated(page)  # the address was kept
            assert await page.evaluate("JSON.stringify(localStorage)") == "{}"
            assert await page.evaluate("sessionStorage.getItem('vitrine-key')") == "secret-word"
            assert await page.evaluate("document.cookie") == ""  # no script can read it
            await page.reload()
            await generated(page)
            # Another tab has the cookie and not the key: the page itself asks.
            tab = await page.context.new_page()
            await tab.goto(url)
            await expect(tab.locator("#key-dialog")).to_be_visible()
            await tab.locator("#key").fill("another")
            await tab.get_by_role("button", name="Use it", exact=True).click()
            await expect(tab.locator("#key-said")).to_have_text(
                "The server does not know this key."
            )
            await tab.locator("#key").fill("secret-word")
            await tab.keyboard.press("Enter")
            await generated(tab)
            assert await text_of(tab) == await text_of(page)
        assert "secret-word" not in server.log.read_text()


@pytest.mark.slow
async def test_too_many_requests(tmp_path: Path, opened: Opens) -> None:
    """A key that has one request in flight, and the page is the second."""
    with running_server(tmp_path, *KEYS, "--max-requests-per-key", "1") as server:
        async with opened(server.url, expected=("401", "429")) as page:
            await page.locator("#key").fill("secret-word")
            await page.keyboard.press("Enter")
            await expect(page.locator("#tiles dd").first).to_be_visible()
            await page.locator("#prompt").fill(STORY)
            await page.locator("#field-max_tokens").evaluate("(e) => e.max")
            await page.evaluate(
                "() => { window.other = fetch('/generate', {method: 'POST', headers: "
                "{'content-type': 'application/json', authorization: 'Bearer secret-word'}, "
                "body: JSON.stringify({prompt: 'Once', max_tokens: 500, ignore_eos: true})}) }"
            )
            await page.evaluate("window.other.then(() => null)")
            await page.locator("#go").click()
            notice = page.locator("#notices")
            await expect(notice).to_contain_text("Too Many Requests")
            await expect(notice).to_contain_text(re.compile(r"Status 429, request \w+"))
            again = page.get_by_role("button", name=re.compile("Try again in \\d+ s"))
            await expect(again).to_be_disabled()
            await page.evaluate("window.other.then((answer) => answer.text())")
            await page.get_by_role("button", name="Try again", exact=True).click()
            await generated(page)
            await expect(notice).to_be_empty()


async def test_a_field_that_the_server_refuses(server: Server, opened: Opens) -> None:
    async with opened(address(server.url, prompt=STORY), expected=("422",)) as page:
        await page.locator("#settings summary").click()
        await page.locator("#field-max_tokens").fill("9000")
        await page.locator("#settings summary").click()
        await page.locator("#go").click()
        notice = page.get_by_role("alert")
        await expect(notice).to_contain_text("max_tokens")
        await expect(notice).to_contain_text("512")
        field = page.locator("#field-max_tokens")
        await expect(field).to_be_visible()
        await expect(field).to_have_attribute("aria-invalid", "true")
        await field.fill("8")
        await page.locator("#go").click()
        await generated(page)


async def test_a_field_that_cannot_be_read(server: Server, opened: Opens) -> None:
    """What the field says and what is sent must be the same: nothing is sent."""
    async with opened(address(server.url, prompt=STORY)) as page:
        await page.locator("#settings summary").click()
        for field, wrong, right in (("temperature", "", "1"), ("seed", "ten", "10")):
            await page.locator(f"#field-{field}").fill(wrong)
            await page.locator("#go").click()
            await expect(page.get_by_role("alert")).to_contain_text(f"{field}: ")
            assert await page.locator("#tokens .token").count() == 0
            await page.locator(f"#field-{field}").fill(right)
        await page.locator("#go").click()
        await generated(page)


async def test_nothing_to_continue(server: Server, opened: Opens) -> None:
    async with opened(server.url) as page:
        await page.locator("#go").click()
        await expect(page.locator("#prompt")).to_have_attribute("aria-invalid", "true")
        await expect(page.locator("#prompt")).to_be_focused()


@pytest.mark.slow
async def test_the_connection_is_lost(tmp_path: Path, opened: Opens) -> None:
    flags = ("--threads", "1", "--no-standby")
    with running_server(tmp_path, *flags, unhurried=True) as server:
        url = address(server.url, prompt=STORY, seed=5, max_tokens=480, temperature=1.2)
        expected = ("ERR_", "Failed to load")
        async with opened(url, expected=expected) as page:
            await page.locator("#go").click()
            await expect(page.locator("#tokens .new").nth(5)).to_be_attached()
            server.process.kill()
            notice = page.locator("#notices")
            await expect(notice).to_contain_text("Connection lost")
            await expect(notice).to_contain_text("what came is shown")
            assert len(await text_of(page)) > 5
            await expect(page.locator("#go")).to_be_visible()
            await expect(page.locator("#tiles")).to_have_class(re.compile("stale"))


@pytest.mark.slow
async def test_a_server_that_does_not_explain(tmp_path: Path, opened: Opens) -> None:
    with running_server(tmp_path, "--threads", "1", "--no-explain") as server:
        url = address(server.url, prompt=STORY, seed=3, max_tokens=20)
        async with opened(url) as page:
            await page.locator("#go").click()
            await expect(page.locator("#outcome")).to_contain_text("tokens a second")
            await expect(page.locator("#missing")).to_contain_text("does not explain")
            await expect(page.locator("#missing")).to_contain_text("--no-explain")
            await expect(page.locator("#rooms")).to_be_hidden()
            await page.locator("#tokens .new").nth(3).hover()
            await expect(page.locator("#card section")).to_have_count(1)  # its rivals are there


@pytest.mark.slow
async def test_the_page_waits_for_the_model(tmp_path: Path, opened: Opens) -> None:
    """Opened before the model is loaded, it says so and can try again."""
    with running_server(tmp_path, "--threads", "1", ready=False) as server:
        while "Uvicorn running" not in server.log.read_text():
            assert server.process.poll() is None
            threading.Event().wait(0.01)
        async with opened(server.url, expected=("503",)) as page:
            notice = page.locator("#notices")
            told = notice.locator("b").or_(page.locator("#model", has_text="stories"))
            await expect(told).to_be_visible()
            if await notice.locator("b").count():  # else it was loaded sooner than the page
                await expect(notice).to_contain_text("Service Unavailable")
                server.wait_ready()
                await page.get_by_role("button", name="Try again", exact=True).click()
            await expect(page.locator("#model")).to_contain_text("stories")


async def test_an_unknown_view_is_as_usual(server: Server, opened: Opens) -> None:
    words = {"prompt": STORY, "head": "99.99", "token": 7000, "temperature": "x", "cut": "1.2.3"}
    url = address(server.url, **words, shown="prompt", seed="-1", off="77.1")
    async with opened(url) as page:
        await explained(page)
        await expect(page.locator("#large .label")).to_have_text("The mean of all heads and layers")
        assert await page.locator("#field-temperature").input_value() == "0.8"
        assert await page.locator("#field-seed").input_value() == ""
