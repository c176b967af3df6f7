"""The page's own parsers, run in the browser, beside others for the same formats."""

from __future__ import annotations

import random

import httpx2
import pytest
from playwright.async_api import expect
from prometheus_client.parser import text_string_to_metric_families

from tests.api.sse_parser import EventStreamParser
from tests.servers import Server
from tests.web.conftest import Opens
from tests.web.pages import evaluate, until

pytestmark = pytest.mark.asyncio(loop_scope="session")
STREAM = (
    ": hello\n\nid: a:1\nevent: token\ndata: one\ndata: two\n\ndata\n\nevent: x\n\n"
    "data:no space\r\ndata:  two spaces\r\rid\ndata: \N{SNOWMAN}\n\nretry: 5\ndata: end\r\n\r\n"
    "data: never ended"
)


async def test_event_streams_in_any_pieces(server: Server, opened: Opens) -> None:
    """As the parser of our tests reads them, which follows the standard."""
    reference = [
        {"event": event.type, "data": event.data, "id": event.id}
        for event in EventStreamParser().feed(STREAM.encode())
    ]
    assert len(reference) >= 4
    draw = random.Random(20261121)
    cuts = [sorted(draw.sample(range(1, len(STREAM)), k)) for k in (0, 1, 5, 40, len(STREAM) - 1)]
    pieces = [
        [STREAM[a:b] for a, b in zip([0, *cut], [*cut, len(STREAM)], strict=True)] for cut in cuts
    ]
    async with opened(server.url) as page:
        found = await evaluate(
            page,
            "sse.js",
            "return argument.map((pieces) => { const parser = new m.EventParser();"
            "return pieces.flatMap((piece) => parser.feed(piece)) })",
            pieces,
        )
    for events in found:
        assert events == reference


async def test_metrics_as_prometheus_reads_them(server: Server, opened: Opens) -> None:
    text = httpx2.get(f"{server.url}/metrics").text
    async with opened(server.url) as page:
        parsed = await evaluate(
            page, "metrics.js", "return Object.fromEntries(m.parseMetrics(argument))", text
        )
        tiles = await evaluate(
            page, "metrics.js", "return m.tilesOf(m.parseMetrics(argument), null, 1)", text
        )
    shown = {name for name, value, _ in tiles if value is not None}
    assert shown == {"In the batch", "Waiting", "KV cache in use"}, "a rate needs two looks"
    reference = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            reference[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    assert len(reference) > 20
    assert parsed == reference


async def test_the_tiles_move(server: Server, opened: Opens) -> None:
    async with opened(server.url) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        tiles = page.locator("#tiles dd")
        await expect(tiles).to_have_count(4)
        await expect(tiles.nth(0)).to_have_text("0")
        await page.locator("#prompt").fill("Once")
        await page.locator("#field-max_tokens").evaluate("(e) => (e.value = 480)")
        await page.locator("#field-max_tokens").dispatch_event("input")
        await page.locator("#go").click()
        await until(page, "Number(document.querySelector('#tiles dd').textContent) > 0")
        # Not looked at, nothing is asked.
        await page.evaluate("document.body.style.paddingTop = '300vh'; scrollTo(0, 0)")
        await page.wait_for_timeout(300)
        asked.clear()
        await page.wait_for_timeout(1500)
        assert not [url for url in asked if url.endswith("/metrics")]


async def test_the_fragment_and_back(server: Server, opened: Opens) -> None:
    async with opened(server.url) as page:
        for view in (
            {},
            {
                "prompt": "a&b=c#d +%\n\N{SNOWMAN}",
                "seed": "9223372036854775807",
                "token": 0,
                "look": "for",
                "arcs": False,
                "head": [0, 31],
                "upto": 3,
                "offHeads": [[1, 2], [0, 0]],
                "offEdges": [[5, 5]],
                "shown": "text",
            },
        ):
            found = await evaluate(
                page,
                "state.js",
                "const view = {...m.initialState(), ...argument};"
                "return [view, m.fromFragment(m.toFragment(view))]",
                view,
            )
            assert found[0] == found[1]
        body = await evaluate(
            page,
            "state.js",
            "return m.generateBody({...m.initialState(), prompt: 'x', seed: argument})",
            "9223372036854775807",
        )
        assert '"seed":9223372036854775807' in body
