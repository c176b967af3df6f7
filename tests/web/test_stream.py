"""Type, stream, stop, point at tokens, come back by the address."""

from __future__ import annotations

import math
import re

import httpx2
import pytest
from playwright.async_api import expect

from tests.servers import Server
from tests.web.conftest import PHONE, Opens
from tests.web.pages import STORY, address, explained, generated, text_of, view_of

pytestmark = pytest.mark.asyncio(loop_scope="session")
LONG = {"prompt": STORY, "max_tokens": 480, "seed": 5, "temperature": 1.2}


async def test_a_prompt_is_typed_and_streams(server: Server, opened: Opens) -> None:
    async with opened(server.url) as page:
        await page.locator("#prompt").press_sequentially(STORY)
        await page.keyboard.press("Control+Enter")
        await generated(page)
        view = view_of(page)
        assert view["prompt"] == STORY
        body = {"prompt": STORY, "seed": int(view["drawn"]), "max_tokens": 96, "temperature": 0.8}
        answer = server.generate(body | {"logprobs": 3})
        choice = answer["choices"][0]  # type: ignore[index]
        assert await text_of(page) == choice["text"]
        assert await text_of(page, "given") == STORY
        assert await page.locator("#drawn-seed").text_content() == view["drawn"]
        steps = await page.evaluate("import('/web/colours.js').then((m) => m.PROBABILITY_STEPS)")
        shades = page.locator("#tokens .new")
        for i, told in enumerate(choice["logprobs"]):
            shade = sum(math.exp(told["logprob"]) < step for step in steps)
            await expect(shades.nth(i)).to_have_class(re.compile(rf"\bshade-{shade}\b"))


async def test_tokens_come_one_by_one(lingering: Server, opened: Opens) -> None:
    async with opened(address(lingering.url, **LONG)) as page:
        await page.evaluate(
            "() => { window.seen = new Set(); new MutationObserver(() => "
            "window.seen.add(document.querySelectorAll('#tokens .new').length))"
            ".observe(document.getElementById('tokens'), {childList: true}) }"
        )
        await page.locator("#go").click()
        await expect(page.locator("#tokens .new").nth(60)).to_be_attached()
        assert len(await page.evaluate("[...window.seen]")) > 20


@pytest.mark.parametrize("way", ["button", "escape"])
async def test_a_stream_is_stopped(
    server: Server, lingering: Server, opened: Opens, way: str
) -> None:
    async with opened(address(lingering.url, **LONG)) as page:
        await page.locator("#go").click()
        await expect(page.locator("#tokens .new").nth(5)).to_be_attached()
        if way == "button":
            await page.locator("#stop").click()
        else:
            await page.keyboard.press("Escape")
        await expect(page.locator("#outcome")).to_contain_text("tokens, stopped")
        await expect(page.locator("#go")).to_be_visible()
        so_far = await text_of(page)
        whole = server.generate(LONG)["choices"][0]["text"]  # type: ignore[index]
        assert whole.startswith(so_far)
        assert 0 < len(so_far) < len(whole)
        await explained(page)  # what there is can be looked into


async def test_pointing_at_a_token_shows_its_rivals(server: Server, opened: Opens) -> None:
    async with opened(address(server.url, prompt=STORY, seed=3, shown="text")) as page:
        await generated(page)
        body = {"prompt": STORY, "seed": 3, "max_tokens": 96, "temperature": 0.8, "logprobs": 8}
        told = server.generate(body)["choices"][0]["logprobs"][4]  # type: ignore[index]
        token = page.locator("#tokens .new").nth(4)
        await token.hover()
        card = page.locator("#card")
        await expect(card.locator(".exhibit-name")).to_have_text(told["text"].replace(" ", "·"))
        first = card.locator("section").nth(0).locator("li")
        await expect(first).to_have_count(8)
        shown = await first.locator(".bar-name").all_inner_texts()
        assert shown == [one["text"].replace(" ", "·").replace("\n", "↵") for one in told["top"]]
        # What it looked at is told in the card, and shades the text.
        position = int(await token.get_attribute("data-position") or -1)
        question = {"prompt": await ids_of(page), "attention": "mean"}
        answer = httpx2.post(f"{server.url}/explain", json=question).json()
        row = answer["attention"]["mean"][position]
        strongest = max(range(len(row)), key=row.__getitem__)
        bars = card.locator("section").nth(1).locator(".bar-name")
        await expect(bars.first).to_contain_text(f" {strongest}")
        weight = page.locator(f"#token-{strongest}")
        assert await weight.evaluate("(e) => e.style.getPropertyValue('--weight')") == "100.0%"
        await page.mouse.move(0, 0)
        await expect(card).to_have_class(re.compile("empty"))


async def ids_of(page) -> list[int]:  # type: ignore[no-untyped-def]
    """Ids of all tokens on the page."""
    ids: list[int] = await page.evaluate(
        "import('/web/page.js').then((m) => m.page.tokens.map((token) => token.id))"
    )
    return ids


async def test_the_stream_itself_tells_what_was_looked_at(lingering: Server, opened: Opens) -> None:
    async with opened(address(lingering.url, **LONG), expected=("ERR_FAILED",)) as page:
        await page.route("**/explain", lambda route: route.abort())
        await page.locator("#go").click()
        token = page.locator("#tokens .new").nth(3)
        await token.hover()
        attended = page.locator("#card section").nth(1)
        await expect(attended).to_contain_text("To choose it, looked at")
        assert await attended.locator("li").count() == 8
        await page.locator("#stop").click()
        await expect(page.locator("#outcome")).to_contain_text("stopped")
        await expect(page.locator("#notices")).to_contain_text("Connection lost")
        await page.unroute("**/explain")
        await page.get_by_role("button", name="Try again").click()
        await explained(page)


async def test_tokens_by_the_keyboard(server: Server, opened: Opens) -> None:
    async with opened(address(server.url, prompt=STORY, seed=3, shown="text")) as page:
        await generated(page)
        tokens = page.locator("#tokens")
        while not await tokens.evaluate("(e) => e === document.activeElement"):
            await page.keyboard.press("Tab")
        first_new = await page.locator("#tokens .new").first.get_attribute("id")
        await expect(tokens).to_have_attribute("aria-activedescendant", str(first_new))
        await page.keyboard.press("ArrowRight")
        await page.keyboard.press("ArrowRight")
        await page.keyboard.press("ArrowLeft")
        position = int(str(first_new).removeprefix("token-")) + 1
        await expect(tokens).to_have_attribute("aria-activedescendant", f"token-{position}")
        await expect(page.locator("#card")).to_contain_text(f"token {position} ")
        await page.keyboard.press("Enter")
        chosen = page.locator(f"#token-{position}")
        await expect(chosen).to_have_attribute("aria-selected", "true")
        assert view_of(page)["token"] == str(position)
        await page.keyboard.press("Home")
        await expect(page.locator("#card")).to_contain_text("nothing came before it")
        await page.keyboard.press("Escape")
        await expect(chosen).to_have_attribute("aria-selected", "false")


@pytest.mark.slow
async def test_the_address_brings_the_same_view_back(server: Server, opened: Opens) -> None:
    async with opened(server.url) as page:
        await page.locator("#prompt").fill(STORY)
        await page.locator("#settings summary").click()
        await page.locator("#field-temperature").fill("1.3")
        await page.locator("#field-max_tokens").fill("40")
        await page.locator("#go").click()
        await generated(page)
        await page.locator("#token-9").click()
        await page.locator("[data-head='2.5'] .map").click()
        await page.locator("[data-head='1.1'] .off").click()
        await expect(page.locator("#whatif .pair")).to_be_visible()
        before = await seen(page)
        url = page.url
    async with opened(url) as page:
        await generated(page)
        await expect(page.locator("#whatif .pair")).to_be_visible()
        await expect(page.locator("#large .label")).to_have_text("Layer 2 · head 5")
        assert await page.locator("#field-temperature").input_value() == "1.3"
        assert await seen(page) == before
        await page.reload()
        await generated(page)
        await expect(page.locator("#whatif .pair")).to_be_visible()
        await expect(page.locator("#steps")).to_contain_text("Layer 2 · head 5")
        assert await seen(page) == before


async def seen(page) -> list[str]:  # type: ignore[no-untyped-def]
    """Everything that a view should bring back; times are others each time."""
    await page.wait_for_load_state("networkidle")
    parts = ["#tokens", "#card", "#large .label", "#lens", "#steps", "#whatif", "#settings-now"]
    return [await page.locator(part).first.inner_text() for part in parts]


@pytest.mark.parametrize("touch", [True, False])
async def test_a_finger_and_a_mouse_choose_a_token_under_the_card(
    server: Server, opened: Opens, touch: bool
) -> None:
    """On a narrow window the card lies over the text."""
    url = address(server.url, prompt=STORY, seed=3, shown="text")
    async with opened(url, size=PHONE, touch=touch) as page:
        await generated(page)
        token = page.locator("#tokens .new").nth(2)
        await (token.tap() if touch else token.click())
        await expect(token).to_have_attribute("aria-selected", "true")
        covered = await page.evaluate(
            "(id) => { const box = document.getElementById(id).getBoundingClientRect();"
            "const x = box.left + box.width / 2, y = box.top + box.height / 2;"
            "return document.elementFromPoint(x, y).closest('#tokens') === null }",
            await token.get_attribute("id"),
        )
        assert not covered, "the card stands in front of the token it is about"
