"""The report in a real browser: every figure is there, says something, and covers nothing."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.async_api import Page

from loadtests.report.__main__ import draw
from tests.loadtests.report_runs import make_run
from tests.web.conftest import DESKTOP, PHONE, Opens

pytestmark = pytest.mark.asyncio(loop_scope="session")
KEYS = {
    *("throughput", "latency", "roofline", "bytes", "where", "size", "cost", "demand", "limits"),
}
# Pixels by which boxes of letters may touch: a box is higher than what is in it.
TOUCH = 2.0
# Everything that is drawn, with its box on the page.
FIGURES = """() => [...document.querySelectorAll("figure")].map((figure) => {
  const box = (one) => { const b = one.getBoundingClientRect();
    return { x: b.x, y: b.y + scrollY, right: b.right, bottom: b.bottom + scrollY }; };
  const svg = figure.querySelector("svg");
  const marks = [...svg.querySelectorAll("g[id*='axes'] path, g[id*='axes'] use")]
    .filter((one) => { const b = one.getBBox(); return b.width > 1 || b.height > 1; });
  const ink = (one) => getComputedStyle(one).fill;
  return { key: figure.closest("section").id, box: box(svg), marks: marks.length,
    ink: [...new Set([...svg.querySelectorAll("text")].map(ink))],
    texts: [...svg.querySelectorAll("text")].filter((one) => one.textContent.trim())
      .map((one) => ({ text: one.textContent.trim(), ...box(one) })) };
})"""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = [make_run("stories", with_limits=True), make_run("gpt2")]
    return draw(runs, {}, tmp_path_factory.mktemp("report"))


def overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(
        one["x"] < other["right"] - TOUCH
        and other["x"] < one["right"] - TOUCH
        and one["y"] < other["bottom"] - TOUCH
        and other["y"] < one["bottom"] - TOUCH
    )


async def test_no_figure_is_empty_and_nothing_overlaps(opened: Opens, page_file: Path) -> None:
    async with opened(page_file.as_uri()) as page:
        figures = await page.evaluate(FIGURES)
    assert {figure["key"] for figure in figures} == KEYS
    for figure in figures:
        box, key = figure["box"], figure["key"]
        assert box["right"] - box["x"] > 600, key
        assert box["bottom"] - box["y"] > 150, key
        assert figure["marks"] >= 10, f"{key} draws next to nothing"
        assert len(figure["texts"]) >= 10, f"{key} says next to nothing"
        for text in figure["texts"]:
            inside = box["x"] - TOUCH <= text["x"] and text["right"] <= box["right"] + TOUCH
            assert inside, f"{key}: {text['text']} is cut off"
        for one, other in combinations(figure["texts"], 2):
            assert not overlap(one, other), f"{key}: {one['text']} lies on {other['text']}"
    for above, below in pairwise(figures):
        assert above["box"]["bottom"] < below["box"]["y"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_picture_of_it(
    opened: Opens, page_file: Path, tmp_path: Path, scheme: str
) -> None:
    async with opened(page_file.as_uri(), scheme=scheme) as page:
        await page.screenshot(path=tmp_path / "report.png", full_page=True)
        figures = await page.evaluate(FIGURES)
        paper = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    is_dark = scheme == "dark"
    picture = Image.open(tmp_path / "report.png").convert("L")
    assert picture.width == DESKTOP["width"]
    corner = picture.getpixel((2, 2))
    assert isinstance(corner, int)
    assert (corner < 128) == is_dark
    for figure in figures:
        box = figure["box"]
        part = picture.crop(tuple(round(box[side]) for side in ("x", "y", "right", "bottom")))
        # Lines and letters: a tenth of the greys between paper and ink at least.
        low, high = part.getextrema()
        assert isinstance(low, int)
        assert isinstance(high, int)
        assert high - low > 100, f"{figure['key']} cannot be seen on {paper}"
        for ink in figure["ink"]:
            brightness = sum(int(word) for word in ink[4:-1].split(","))
            # White numbers stand on coloured bars; all else is ink.
            assert brightness > 300 if is_dark else brightness < 450 or brightness == 765, (
                f"{figure['key']}: text in {ink} on {paper}"
            )


async def test_prices_may_be_edited(opened: Opens, page_file: Path) -> None:
    async with opened(page_file.as_uri()) as page:
        before = await cells(page)
        price = page.locator('[data-price="0"]')
        await price.fill(str(2 * float(await price.input_value())))
        after = await cells(page)
    # The first device is the CPU; its rows double, the others stay.
    for old, new in zip(before, after, strict=True):
        factor = 2 if old["lane"] == "0" else 1
        assert new["dollars"] == pytest.approx(factor * old["dollars"], rel=0.01)
        assert new["energy"] == pytest.approx(old["energy"], rel=0.01)


async def cells(page: Page) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await page.evaluate(
        """() => [...document.querySelectorAll("tr[data-lane]")].map((row) => ({
          lane: row.dataset.lane, dollars: Number(row.querySelector(".dollars").textContent),
          energy: Number(row.querySelector(".energy").textContent) }))"""
    )
    assert found
    return found


async def test_missing_gpu_measurements_are_said(opened: Opens, page_file: Path) -> None:
    async with opened(page_file.as_uri()) as page:
        assert "GPU measurements are missing" in await page.locator(".notice").inner_text()
        said = await page.locator("#throughput svg").text_content()
    assert said is not None
    assert "H100 SXM: roof, computed" in said


async def test_a_recorded_gpu_is_shown_as_recorded(opened: Opens, tmp_path: Path) -> None:
    from msgspec.structs import replace

    runs = [make_run("gpt2"), replace(make_run("gpt2", on_gpu=True), is_recorded=True)]
    async with opened(draw(runs, {}, tmp_path).as_uri()) as page:
        assert await page.locator(".notice").count() == 0
        said = await page.locator("#throughput svg").text_content()
        assert said is not None
        assert "recorded 2026-11-21" in said


async def test_on_a_phone_figures_scroll_and_the_page_does_not(
    opened: Opens, page_file: Path
) -> None:
    async with opened(page_file.as_uri(), size=PHONE) as page:
        wide = await page.evaluate("document.documentElement.scrollWidth")
    assert wide <= PHONE["width"]
