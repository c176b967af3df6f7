"""Arcs over the text: to the tokens that were looked at most, where those stand."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from playwright.async_api import Page, expect

from tests.servers import Server
from tests.web.conftest import DESKTOP, PHONE, Opens
from tests.web.pages import STORY, address, explained, generated, until, view_of

pytestmark = pytest.mark.asyncio(loop_scope="session")
ANIMAL = "The animal didn't cross the street because it was too tired"
STREAMED = {"prompt": STORY, "seed": 3, "shown": "text"}
LEAST_SHARE = 0.03
MAX_ARCS = 6

ARCS = """() => [...document.querySelectorAll("#arcs .arc")].map((arc) => {
  const path = arc.querySelector("path"), dot = arc.querySelector("circle");
  const origin = document.getElementById("arcs").getBoundingClientRect();
  const at = (point) => [point.x + origin.left, point.y + origin.top];
  const whole = path.getBoundingClientRect();
  return {
    key: Number(arc.dataset.key),
    opacity: Number(arc.getAttribute("opacity")),
    width: Number(path.getAttribute("stroke-width")),
    start: at(path.getPointAtLength(0)),
    end: at(path.getPointAtLength(path.getTotalLength())),
    dot: at({ x: Number(dot.getAttribute("cx")), y: Number(dot.getAttribute("cy")) }),
    left: whole.left,
    right: whole.right,
    motion: getComputedStyle(arc).animationName,
    stroke: getComputedStyle(path).stroke,
  };
})"""
INKS = """(position) => {
  const { left, right, top, bottom } =
    document.querySelector(`#token-${position} .ink`).getClientRects()[0];
  return { left, right, top, bottom };
}"""


async def arcs(page: Page) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await page.evaluate(ARCS)
    return found


async def check_places(page: Page, found: list[dict[str, Any]], query: int) -> None:
    """Each goes from the query's ink to its key's: from edge to edge, in the middle."""
    here = await page.evaluate(INKS, query)
    for one in found:
        there = await page.evaluate(INKS, one["key"])
        for (x, y), ink in ((one["start"], here), (one["end"], there)):
            if one["key"] != query:
                assert x == pytest.approx((ink["left"] + ink["right"]) / 2, abs=1)
            assert min(abs(y - ink["top"]), abs(y - ink["bottom"])) < 1
        assert one["dot"] == pytest.approx(one["end"], abs=0.5)


def strongest(row: list[float]) -> list[int]:
    """Positions, the weakest first, as they are drawn."""
    kept = [key for key, weight in enumerate(row) if weight >= LEAST_SHARE * max(row)]
    return sorted(sorted(kept, key=row.__getitem__)[-MAX_ARCS:], key=row.__getitem__)


async def test_arcs_go_to_what_was_looked_at_most(server: Server, opened: Opens) -> None:
    question = {"prompt": ANIMAL, "attention": "full", "layers": [3], "heads": [3]}
    answer = httpx2.post(f"{server.url}/explain", json=question).json()
    row = answer["attention"]["full"][0][0][8]
    async with opened(address(server.url, prompt=ANIMAL, shown="prompt", head="3.3")) as page:
        await explained(page)
        assert await arcs(page) == [], "nothing is pointed at"
        await page.locator("#token-8").hover()
        found = await arcs(page)
        assert [one["key"] for one in found] == strongest(row)
        for name in ("width", "opacity"):
            values = [one[name] for one in found]
            assert values == sorted(values)
            assert values[-1] > 1.5 * values[0]
        await check_places(page, found, 8)
        await page.mouse.move(0, 0)
        assert await arcs(page) == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
async def test_arcs_follow_a_text_of_many_lines(
    server: Server, opened: Opens, size: dict[str, int]
) -> None:
    async with opened(address(server.url, **STREAMED), size=size) as page:
        await page.emulate_media(reduced_motion="reduce")  # nothing scrolls while we measure
        await generated(page)
        await page.locator("#tokens").focus()
        for key in ("Home", "ArrowDown", "ArrowDown"):  # where the third line begins
            await page.keyboard.press(key)
        active = await page.locator("#tokens").get_attribute("aria-activedescendant")
        query = int(str(active).removeprefix("token-"))
        found = await arcs(page)
        assert 1 <= len(found) <= MAX_ARCS
        await check_places(page, found, query)
        tops = {round((await page.evaluate(INKS, one["key"]))["top"]) for one in found}
        assert len(tops) > 1, "all of them in one line: another text would test more"
        assert all(one["left"] >= 0 and one["right"] <= size["width"] for one in found)
        # The text wraps in another way: the arcs go along.
        await page.keyboard.press("Enter")
        before = await arcs(page)
        path = await page.locator("#arcs path").first.get_attribute("d")
        await page.set_viewport_size({"width": 500, "height": 900})
        now = "document.querySelector('#arcs path').getAttribute('d')"
        await until(page, f"{now} !== {path!r}")
        after = await arcs(page)
        assert [one["key"] for one in after] == [one["key"] for one in before]
        await check_places(page, after, query)


async def test_arcs_while_it_streams(lingering: Server, opened: Opens) -> None:
    """From what the stream itself tells, before anything was explained."""
    words = {"prompt": STORY, "max_tokens": 480, "seed": 5, "temperature": 1.2}
    async with opened(address(lingering.url, **words), expected=("ERR_FAILED",)) as page:
        await page.route("**/explain", lambda route: route.abort())
        await page.locator("#go").click()
        token = page.locator("#tokens .new").nth(3)
        await token.hover()
        assert len(await arcs(page)) > 1
        await page.locator("#stop").click()
        await expect(page.locator("#outcome")).to_contain_text("stopped")


async def test_arcs_are_switched_off_and_stay_off(server: Server, opened: Opens) -> None:
    words = {"prompt": ANIMAL, "shown": "prompt", "token": 8}
    async with opened(address(server.url, **words)) as page:
        await explained(page)
        choice = page.locator("#arcs-choice")
        assert await arcs(page)
        await choice.get_by_role("button", name="off").focus()
        await page.keyboard.press("Enter")
        assert await arcs(page) == []
        assert view_of(page)["arcs"] == "off"
        off = choice.get_by_role("button", name="off")
        await expect(off).to_have_attribute("aria-pressed", "true")
        await expect(off).to_be_focused()
        await page.reload()
        await explained(page)
        await expect(page.locator("#token-8")).to_have_attribute("aria-selected", "true")
        assert await arcs(page) == []
        await choice.get_by_role("button", name="on").click()
        assert await arcs(page)
        assert "arcs" not in view_of(page)


async def test_arcs_do_not_move_for_who_wants_no_motion(server: Server, opened: Opens) -> None:
    words = {"prompt": ANIMAL, "shown": "prompt", "token": 8}
    async with opened(address(server.url, **words)) as page:
        await explained(page)
        for motion, name in (("no-preference", "appear"), ("reduce", "none")):
            await page.emulate_media(reduced_motion=motion)
            assert {one["motion"] for one in await arcs(page)} == {name}


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
async def test_arcs_stand_out_in_both_themes(
    server: Server, opened: Opens, scheme: str, *, dark: bool
) -> None:
    """3 to 1 against the case, as graphics must (WCAG 1.4.11); blended so that what they cross
    can be read."""
    words = {"prompt": ANIMAL, "shown": "prompt", "token": 8}
    async with opened(address(server.url, **words), scheme=scheme) as page:
        await explained(page)
        (stroke,) = {one["stroke"] for one in await arcs(page)}
        ground = await page.locator(".exhibit").evaluate("(e) => getComputedStyle(e).background")
        colours = [parsed(stroke), parsed(ground)]
        lighter, darker = sorted(map(luminance, colours), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3
        blend = await page.locator("#arcs").evaluate("(e) => getComputedStyle(e).mixBlendMode")
        assert blend == ("screen" if dark else "multiply")


def parsed(colour: str) -> list[float]:
    inner = colour[colour.index("rgb(") + 4 : colour.index(")")]
    return [float(one) / 255 for one in inner.split(",")]


def luminance(rgb: list[float]) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
