"""The rooms below the text: what they show is what POST /explain says."""

from __future__ import annotations

import math
from typing import Any

import httpx2
import pytest
from playwright.async_api import Page, expect

from tests.servers import Server
from tests.web.conftest import Opens
from tests.web.pages import address, explained, labels, view_of

pytestmark = pytest.mark.asyncio(loop_scope="session")
ANIMAL = "The animal didn't cross the street because it was too tired"
LAYERS, HEADS = 5, 8


def explain(server: Server, **question: object) -> dict[str, Any]:
    response = httpx2.post(f"{server.url}/explain", json={"prompt": ANIMAL, **question})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def percents(candidates: list[dict[str, Any]]) -> list[str]:
    found = []
    for one in candidates:
        value = 100 * math.exp(one["logprob"])
        found.append("< 0.1 %" if value < 0.1 else f"{value:.{0 if value >= 9.95 else 1}f} %")
    return found


async def test_an_example_is_looked_into(server: Server, opened: Opens) -> None:
    async with opened(server.url) as page:
        await page.get_by_role("button", name="The animal didn't cross").click()
        await explained(page)
        # The head that looks most from "it" at "animal".
        weights = explain(server, attention="full")["attention"]["full"]
        pairs = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
        layer, head = max(pairs, key=lambda pair: weights[pair[0]][pair[1]][8][1])
        await expect(page.locator("#steps")).to_contain_text(f"Layer {layer} · head {head}")
        view = {"prompt": ANIMAL, "shown": "prompt", "token": "8", "head": f"{layer}.{head}"}
        assert view_of(page) == view
        await expect(page.locator("#card .exhibit-name")).to_have_text("·it")
        assert await page.locator("#tokens .new").count() == 0
        assert await page.locator("#grid canvas").count() == LAYERS * HEADS
        first = explain(server)["next"][0]
        await expect(page.locator("#outcome")).to_contain_text(percents([first])[0])
        # Given tokens have their probabilities too, and rivals from the lens before them.
        lens = explain(server, lens_positions=[7], lens=5)["lens"][-1]["candidates"]
        assert await labels(page, "#card section:nth-of-type(1) .bar-value") == percents(lens)


async def test_a_head_is_chosen_and_worked_out(server: Server, opened: Opens) -> None:
    async with opened(address(server.url, prompt=ANIMAL, shown="prompt", token=8)) as page:
        await explained(page)
        await page.locator("[data-head='3.2'] .map").click()
        await expect(page.locator("[data-head='3.2'] .map")).to_have_attribute(
            "aria-pressed", "true"
        )
        await expect(page.locator("#steps")).to_contain_text("Layer 3 · head 2")
        question = {"layer": 3, "head": 2, "query": 8}
        answer = explain(server, attention="full", head=question, lens_positions=[8])
        steps = answer["head"]
        weights = sorted(steps["weights"], reverse=True)
        shown = await labels(page, "#steps tbody .weight")
        assert shown == [f"{weight:.4f}" for weight in weights[:8]]
        key = steps["weights"].index(weights[0])
        row = page.locator("#steps tbody tr").first
        assert (await row.locator(".number").all_inner_texts())[:2] == [
            f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
            for value in (steps["scores"][key], steps["scaled"][key])
        ]
        await page.get_by_role("button", name="Show the other").click()
        await expect(page.locator("#steps tbody tr")).to_have_count(9)
        # The lens of the same query, and the text in the shades of this head.
        assert await page.locator("#lens tbody tr").count() == LAYERS + 1
        cells = await labels(page, "#lens tbody tr:last-child .remark")
        last = next(row for row in answer["lens"] if row["layer"] == LAYERS)["candidates"]
        assert [cell.strip() for cell in cells] == percents(last)
        row = answer["attention"]["full"][3][2][8]
        strongest = max(range(9), key=row.__getitem__)
        shade = page.locator(f"#token-{strongest}")
        assert await shade.evaluate("(e) => e.style.getPropertyValue('--weight')") == "100.0%"


async def test_the_grid_by_the_keyboard(server: Server, opened: Opens) -> None:
    async with opened(address(server.url, prompt=ANIMAL, shown="prompt")) as page:
        await explained(page)
        await page.locator("[data-head='0.0'] .map").focus()
        for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "Enter", "x"):
            await page.keyboard.press(key)
        view = view_of(page)
        assert (view["head"], view["off"]) == ("1.1", "1.1")
        await expect(page.locator("#large .label")).to_have_text("Layer 1 · head 1")
        await page.get_by_role("button", name="Switch this head on again").click()
        assert "off" not in view_of(page)


async def compared(page: Page) -> dict[str, Any]:
    """What the two sides say."""
    sides = {}
    for name, selector in (("as it is", "section"), ("ablated", "section.ablated")):
        side = page.locator(f"#whatif .pair {selector}").first
        sides[name] = {
            "percents": await side.locator(".bar-value").all_inner_texts(),
            "goes on": await side.locator(".continuation").text_content(),
        }
    return sides


async def test_a_head_is_switched_off(server: Server, opened: Opens) -> None:
    async with opened(address(server.url, prompt=ANIMAL, shown="prompt")) as page:
        await explained(page)
        await expect(page.locator("#whatif")).to_contain_text("Nothing is switched off")
        for head in ("0.1", "1.3"):
            await page.locator(f"[data-head='{head}'] .off").click()
        await expect(page.locator("#whatif .chip")).to_have_count(2)
        ablate = {"heads": [[0, 1], [1, 3]]}
        answer = explain(server, ablate=ablate, max_tokens=24, candidates=10)
        await expect(page.locator("#whatif .divergence b")).to_have_text(
            f"{answer['ablated']['kl']:.{5 if answer['ablated']['kl'] < 0.01 else 3}f}"
        )
        sides = await compared(page)
        for name, told in (("as it is", answer), ("ablated", answer["ablated"])):
            assert sides[name]["percents"] == percents(told["next"])
            assert sides[name]["goes on"] == told["continuation"]["text"].lstrip()
        assert sides["as it is"] != sides["ablated"]
        await page.get_by_role("button", name="Switch everything on").click()
        await expect(page.locator("#whatif")).to_contain_text("Nothing is switched off")
        assert "off" not in view_of(page)


async def test_an_edge_is_cut(server: Server, opened: Opens) -> None:
    async with opened(address(server.url, prompt=ANIMAL, shown="prompt")) as page:
        await explained(page)
        canvas = page.locator("#large canvas")
        box = await canvas.bounding_box()
        assert box is not None
        cell = (box["width"] - 94) / 12  # 92 pixels of names, 2 of margin
        x, y = 92 + cell * 1.5, 92 + cell * 11.5
        await canvas.click(position={"x": x, "y": y})
        assert view_of(page)["cut"] == "11.1"
        await expect(page.locator("#whatif .chip")).to_contain_text("“·tired” → “·animal”")
        answer = explain(server, ablate={"edges": [[11, 1]]}, max_tokens=24)
        await expect(page.locator("#whatif .pair")).to_be_visible()
        sides = await compared(page)
        assert sides["ablated"]["percents"] == percents(answer["ablated"]["next"])
        # The same by the keyboard: the cell above it.
        await canvas.focus()
        await page.keyboard.press("ArrowUp")
        await expect(page.locator("#large-said")).to_contain_text("“·too” (10) gives")
        await page.keyboard.press("Enter")
        assert view_of(page)["cut"] == "11.1,10.1"
        await canvas.click(position={"x": x, "y": y})
        assert view_of(page)["cut"] == "10.1"


async def test_a_text_of_which_not_all_weights_are_asked(server: Server, opened: Opens) -> None:
    """Past 400,000 weights the page has the strongest keys of each row, and asks for whole rows
    of what is chosen."""
    text = "One day a little girl went to the park with her mom and her dog. " * 12
    async with opened(address(server.url, prompt=text, shown="prompt", token=150)) as page:
        asked: list[Any] = []
        page.on(
            "request",
            lambda request: (
                asked.append(request.post_data_json) if request.url.endswith("/explain") else None
            ),
        )
        await explained(page)
        asked.clear()
        await page.reload()
        await explained(page)
        assert [question["attention"] for question in asked] == ["top", "mean", "none"]
        assert await page.locator("#grid canvas").count() == LAYERS * HEADS
        await page.locator("[data-head='1.0'] .map").click()
        await expect(page.locator("#steps")).to_contain_text("Layer 1 · head 0")
        assert asked[-1]["attention"] == "full"
        assert (asked[-1]["layers"], asked[-1]["heads"]) == ([1], [0])


async def test_a_part_of_the_text_is_looked_into(server: Server, opened: Opens) -> None:
    words = {"prompt": "Alice will eat pizza", "seed": 2, "max_tokens": 30, "shown": "text"}
    async with opened(address(server.url, **words)) as page:
        await explained(page)
        await page.get_by_role("button", name="the beginning alone").click()
        given = await page.locator("#tokens .given").count()
        assert view_of(page)["upto"] == str(given)
        await expect(page.locator("#steps")).to_contain_text(f"({given - 1})")
        await page.locator("[data-head='0.1'] .off").click()
        await expect(page.locator("#whatif .pair")).to_be_visible()
        question = {"prompt": words["prompt"], "ablate": {"heads": [[0, 1]]}, "max_tokens": 24}
        answer = httpx2.post(f"{server.url}/explain", json=question).json()
        assert (await compared(page))["as it is"]["goes on"] == answer["continuation"][
            "text"
        ].lstrip()


async def test_what_chose_a_token(server: Server, opened: Opens) -> None:
    """“from the token” is the row of its own query, “that chose it” the row before."""
    words = {"prompt": ANIMAL, "shown": "prompt", "token": 8, "head": "3.2"}
    async with opened(address(server.url, **words)) as page:
        await explained(page)
        await expect(page.locator("#steps")).to_contain_text("query “·it” (8)")
        await page.get_by_role("button", name="that chose it").click()
        await expect(page.locator("#steps")).to_contain_text("query “·because” (7)")
        await expect(page.locator("#card")).to_contain_text("To choose it, “·because” looked at")
        assert view_of(page)["look"] == "for"
