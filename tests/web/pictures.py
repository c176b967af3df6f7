"""Pictures of the playground for the README: `python -m tests.web.pictures`.

On the bundled model, in a browser as the tests find it: `playground.png`, and `stream.gif`, a
stream as it comes, a frame whenever there are more tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.servers import running_server
from tests.web.conftest import find_browser
from tests.web.pages import address, explained, generated

FIGURES = Path(__file__).parent.parent.parent / "docs" / "figures"
ANIMAL = "The animal didn't cross the street because it was too tired"
LILY = "Lily was sad because she lost her red ball. Her mom said,"
MAX_BYTES = 500_000
FRAME_MS = 120
GIF_COLOURS = 48
SLOW = 12_000  # bytes a second, about ten tokens with all that is told of them


async def take(url: str, folder: Path) -> None:
    """Both pictures, of a server at `url`."""
    async with async_playwright() as playwright:
        path = find_browser(playwright)
        if path is None:
            raise SystemExit("no Chromium: run `make browser`")
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        await _picture(browser, url, folder / "playground.png")
        await _stream(browser, url, folder / "stream.gif")
        await browser.close()


async def _picture(browser: Browser, url: str, file: Path) -> None:
    """A text with a chosen token and head, down to the maps."""
    page = await browser.new_page(
        viewport={"width": 1200, "height": 2200}, device_scale_factor=1.25
    )
    view = {"prompt": ANIMAL, "seed": 5, "max_tokens": 48, "temperature": 0.6, "shown": "text"}
    await page.goto(address(url, **view, token=8, upto=12, head="3.3"))
    await generated(page)
    await page.wait_for_load_state("networkidle")
    box = await page.locator(".maps").bounding_box()
    assert box is not None
    clip = {"x": 0, "y": 0, "width": 1200, "height": box["y"] + box["height"] + 24}
    _save_picture(await page.screenshot(clip=clip), file)
    await page.close()


async def _stream(browser: Browser, url: str, file: Path) -> None:
    """The case alone, while a text comes into it."""
    page = await browser.new_page(viewport={"width": 900, "height": 900})
    await page.goto(address(url, prompt=LILY, seed=11, max_tokens=64, temperature=0.9))
    await expect(page.locator("#model")).to_contain_text("parameters")
    # Slower than it comes, so that each token is seen.
    devtools = await page.context.new_cdp_session(page)
    slow = {"offline": False, "latency": 0, "uploadThroughput": -1, "downloadThroughput": SLOW}
    await devtools.send("Network.emulateNetworkConditions", slow)
    # The same height from the first frame to the last.
    await page.evaluate("document.querySelector('.text-side').style.minHeight = '430px'")
    frames = [await _frame(page)]
    await page.locator("#go").click()
    count = 0
    while await page.locator("#stop").is_visible():
        now = await page.locator("#tokens .new").count()
        if now > count:
            frames.append(await _frame(page))
            count = now
    await devtools.send("Network.emulateNetworkConditions", slow | {"downloadThroughput": -1})
    await explained(page)
    frames.append(await _frame(page))
    images = [image.crop((0, 0, *_smallest(frames))) for image in frames]
    palette = images[-1].quantize(GIF_COLOURS)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [800, *[FRAME_MS] * (len(images) - 2), 3500]
    file.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(
        file, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True
    )
    _check(file)
    await page.close()


async def _frame(page: Page) -> Image.Image:
    data = await page.locator(".text-side").screenshot(animations="disabled")
    return Image.open(io.BytesIO(data)).convert("RGB")


def _smallest(images: list[Image.Image]) -> tuple[int, int]:
    return min(image.width for image in images), min(image.height for image in images)


def _save_picture(data: bytes, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(data)).convert("RGB").save(file, optimize=True)
    _check(file)


def _check(file: Path) -> None:
    size = file.stat().st_size
    print(f"{file.name}: {size / 1000:.0f} kB")
    if size > MAX_BYTES:
        raise SystemExit(f"{file} has {size} bytes; the limit is {MAX_BYTES}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FIGURES)
    folder = parser.parse_args().out
    with tempfile.TemporaryDirectory() as logs, running_server(Path(logs)) as server:
        asyncio.run(take(server.url, folder))


if __name__ == "__main__":
    main()
