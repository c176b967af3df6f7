"""Dark and light, wide and narrow; axe-core finds nothing serious."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page, expect

from tests.servers import Server
from tests.web.conftest import DESKTOP, PHONE, Opens
from tests.web.pages import STORY, address, explained, generated, text_of, until

pytestmark = pytest.mark.asyncio(loop_scope="session")
# A full page: a text, a chosen token and head, something switched off.
FULL = {"prompt": STORY, "seed": 3, "shown": "text", "token": 12, "head": "1.3", "off": "2.2"}
READS = ("willReadFrequently",)  # of the test
PAPERS = {"light": "rgb(248, 246, 241)", "dark": "rgb(23, 22, 20)"}


async def paper(page: Page) -> str:
    colour: str = await page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    return colour


@pytest.mark.slow
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe(server: Server, opened: Opens, scheme: str, size: dict[str, int]) -> None:
    async with opened(address(server.url, **FULL), scheme=scheme, size=size) as page:
        await generated(page)
        await expect(page.locator("#whatif .pair")).to_be_visible()
        await page.locator("#settings summary").click()
        await no_violations(page)
        await page.keyboard.press("Escape")  # lets the token go: shades of probability now
        await expect(page.locator("#card")).to_have_class(re.compile("empty"))
        await no_violations(page)


async def no_violations(page: Page) -> None:
    found = await Axe().run(page)
    serious = [
        f"{one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes']]}"
        for one in found.response["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert not serious


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_shade_can_be_read(server: Server, opened: Opens, scheme: str) -> None:
    """Contrast of the text with each shade, of probability and of attention, is AA: 4.5."""
    async with opened(server.url, scheme=scheme) as page:
        ratios = await page.evaluate(CONTRASTS)
    assert len(ratios) == 6 + 11
    assert min(ratios) >= 4.5, ratios


CONTRASTS = """() => {
  const list = document.getElementById("tokens");
  const exhibit = list.closest(".exhibit");
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => value / 255);
    const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const token = document.createElement("span");
  const ink = document.createElement("span");
  ink.className = "ink";
  token.append(ink);
  list.append(token);
  const ratio = () => {
    const style = getComputedStyle(ink);
    const pair = [luminance(style.color), luminance(style.backgroundColor)].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  };
  const ratios = [];
  for (let shade = 0; shade < 6; shade += 1) {
    token.className = `token new shade-${shade}`;
    ratios.push(ratio());
  }
  exhibit.classList.add("attention");
  for (let weight = 0; weight <= 10; weight += 1) {
    token.style.setProperty("--weight", `${weight * 10}%`);
    ratios.push(ratio());
  }
  return ratios;
}"""


async def test_shades_differ_without_hue(server: Server, opened: Opens) -> None:
    """Each shade is darker (or, in the dark, lighter) than the one before: no hue is needed."""
    for scheme, sign in (("light", 1), ("dark", -1)):
        async with opened(server.url, scheme=scheme) as page:
            ratios = await page.evaluate(CONTRASTS)
        probability, attention = ratios[:6], ratios[6:]
        for scale in (probability, attention):
            # Contrast with the text falls from one to the next, in both themes.
            assert scale == sorted(scale, reverse=True), sign
            assert len({round(ratio, 2) for ratio in scale}) == len(scale)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_theme_follows_the_system_until_it_is_chosen(
    server: Server, opened: Opens, scheme: str
) -> None:
    async with opened(server.url, scheme=scheme) as page:
        assert await paper(page) == PAPERS[scheme]
        button = page.locator("#theme")
        await expect(button).to_have_text("Auto")
        for theme in ("Light", "Dark"):
            await button.click()
            await expect(button).to_have_text(theme)
            assert await paper(page) == PAPERS[theme.lower()]
        await page.reload()
        assert await paper(page) == PAPERS["dark"]
        await expect(button).to_have_text("Dark")
        await button.click()
        await expect(button).to_have_text("Auto")
        assert await paper(page) == PAPERS[scheme]


async def test_maps_are_painted_in_the_colours_of_the_theme(server: Server, opened: Opens) -> None:
    async with opened(address(server.url, prompt=STORY, shown="prompt"), expected=READS) as page:
        await explained(page)
        corner = (
            "() => [...document.querySelector('#grid canvas').getContext('2d')"
            ".getImageData(63, 0, 1, 1).data].slice(0, 3)"
        )
        light = await page.evaluate(corner)
        await page.emulate_media(color_scheme="dark")
        await until(page, f"String(({corner})()) !== '{','.join(map(str, light))}'")
        assert sum(await page.evaluate(corner)) < 200 < sum(light)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768, 1024, 1920])
async def test_nothing_sticks_out(server: Server, opened: Opens, width: int) -> None:
    size = {"width": width, "height": 740}
    async with opened(address(server.url, **FULL), size=size) as page:
        await generated(page)
        await expect(page.locator("#whatif .pair")).to_be_visible()
        await page.locator("#settings summary").click()
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        out = await page.evaluate(
            "(width) => [...document.querySelectorAll('main button, main input, main textarea')]"
            ".filter((e) => e.offsetParent && !e.closest('.examples, .grid, .scroll')"
            " && e.getBoundingClientRect().right > width + 0.5).map((e) => e.outerHTML)",
            width,
        )
        assert not out


async def test_a_text_is_never_html(server: Server, opened: Opens) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>&lt;b&gt; \"'> {{7*7}}"
    view = {"prompt": hostile, "shown": "text", "seed": 1, "max_tokens": 8, "off": "0.0"}
    async with opened(address(server.url, **view), expected=("TrustedHTML",)) as page:
        await generated(page)
        await expect(page.locator("#whatif .pair")).to_be_visible()
        await page.locator("#tokens .given").nth(1).click()
        assert await text_of(page, "given") == hostile
        assert await page.locator("main img, main script").count() == 0
        # Nor could a mistake of the page make it one.
        refused = (
            "(element) => { try { element.innerHTML = '<b>'; return 'taken' } "
            "catch (error) { return error.name } }"
        )
        assert await page.locator("#card").evaluate(refused) == "TypeError"


async def test_the_page_asks_nothing_of_other_places(server: Server, opened: Opens) -> None:
    async with opened("about:blank") as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(address(server.url, prompt=STORY, shown="prompt"))
        await explained(page)
        assert len(asked) > 20
        assert all(url.startswith((server.url, "data:")) for url in asked), asked
