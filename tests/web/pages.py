"""What a person does on the playground, and sees."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from playwright.async_api import Page, expect

LIMIT_S = 30
STORY = "Once upon a time there was a little"


def address(url: str, **words: object) -> str:
    """The playground with a view in its fragment."""
    return f"{url}/#{urlencode(words)}"


def view_of(page: Page) -> dict[str, str]:
    """The view that the page's address describes."""
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).fragment).items()}


async def generated(page: Page) -> None:
    """Wait until a stream has ended and the text is explained."""
    await expect(page.locator("#outcome")).to_contain_text("tokens a second")
    await explained(page)


async def explained(page: Page) -> None:
    await expect(page.locator("#rooms")).to_be_visible()
    await expect(page.locator("#steps table")).to_be_visible()
    await expect(page.locator("#lens table")).to_be_visible()


async def text_of(page: Page, kind: str = "new") -> str:
    """The text of the tokens that were drawn ("new") or given."""
    texts = await page.locator(f"#tokens .{kind}").all_text_contents()
    return "".join(texts)


async def labels(page: Page, selector: str) -> list[str]:
    found: list[str] = await page.locator(selector).all_inner_texts()
    return found


async def evaluate(page: Page, module: str, expression: str, argument: Any = None) -> Any:
    """`expression` over `m`, one of the page's modules, and `argument`."""
    script = f"async (argument) => {{ const m = await import('/web/{module}'); {expression} }}"
    return await page.evaluate(script, argument)


async def until(page: Page, condition: str) -> None:
    """Wait until an expression is true; Playwright's own way needs `eval`, forbidden here."""
    deadline = time.monotonic() + LIMIT_S
    while not await page.evaluate(condition):
        assert time.monotonic() < deadline, f"still not after {LIMIT_S} s: {condition}"
        await page.wait_for_timeout(50)
