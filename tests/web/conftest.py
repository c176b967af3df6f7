"""A real headless Chromium on the playground of a real server.

Playwright drives it; the browser is the system's (`make browser`), or the one that `playwright
install chromium` brings. Without either these tests are skipped, and say so.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Playwright, async_playwright, expect

from tests.servers import Server, running_server

SYSTEM_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 900}
LIMIT_MS = 30_000  # the machine may be busy

expect.set_options(timeout=LIMIT_MS)
Opens = Callable[..., AbstractAsyncContextManager[Page]]


def find_browser(playwright: Playwright) -> str | None:
    """The path of a Chromium."""
    candidates = (*SYSTEM_BROWSERS, playwright.chromium.executable_path)
    return next(filter(None, map(shutil.which, candidates)), None)


@pytest.fixture(scope="session")
def lingering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose streams last: for tests that do something in their middle."""
    with running_server(tmp_path_factory.mktemp("lingering"), unhurried=True) as server:
        yield server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """One browser for all tests; each has a context of its own in it."""
    async with async_playwright() as playwright:
        path = find_browser(playwright)
        if path is None:
            pytest.skip("NO CHROMIUM, THE PLAYGROUND IS NOT TESTED: run `make browser`")
        # In a container one is root, and Chromium's sandbox does not start.
        running = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        await running.close()


@pytest.fixture
def opened(browser: Browser) -> Opens:
    """Open a page: `async with opened(url) as page`. In the end nothing may stand in its console,
    `expected` words aside."""

    @asynccontextmanager
    async def open_page(
        url: str,
        *,
        scheme: str = "light",
        size: dict[str, int] = DESKTOP,
        touch: bool = False,
        expected: tuple[str, ...] = (),
    ) -> AsyncIterator[Page]:
        context = await browser.new_context(viewport=size, color_scheme=scheme, has_touch=touch)
        await context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = await context.new_page()
        page.set_default_timeout(LIMIT_MS)
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda line: (
                complaints.append(line.text) if line.type in ("error", "warning") else None
            ),
        )
        try:
            await page.goto(url)
            yield page
            unexpected = [one for one in complaints if not any(word in one for word in expected)]
            assert not unexpected
        finally:
            await context.close()

    return open_page
