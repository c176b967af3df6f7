"""GET / and the playground's files: who gets them, and what the browser is told to keep out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.api import playground
from service.api.keys import parse_keys
from tests.api.asgi_client import Exchange
from tests.api.test_http import check_problem

Houses = Callable[..., Any]
WEB = Path(playground.__file__).parent.parent / "web"
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
KEYS = parse_keys(["glass:secret-word", "other:another-word"])


def policy_of(response: Any) -> dict[str, str]:
    parts = response.headers["content-security-policy"].split("; ")
    return {name: sources for name, _, sources in (part.partition(" ") for part in parts)}


async def test_the_page_lets_nothing_in_that_is_not_its_own(house: Houses) -> None:
    async with house().client() as client:
        response = await client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = policy_of(response)
    assert policy["default-src"] == "'none'"
    for kind in ("script-src", "style-src", "connect-src", "font-src", "img-src"):
        assert policy[kind] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert not re.search(r"<script(?![^>]* src=)", response.text), "a script inside of the page"
    assert not re.search(r"<style|\sstyle=|\son\w+=", response.text)
    assert not re.search(r"https?://", response.text)


async def test_every_file_that_a_file_names_is_there(house: Houses) -> None:
    """Followed from the page: links and sources, imports of modules, fonts of styles."""
    seen: dict[str, str] = {}
    async with house().client() as client:
        waiting = ["/"]
        while waiting:
            path = waiting.pop()
            if path in seen:
                continue
            response = await client.get(path)
            assert response.status_code == 200, path
            seen[path] = response.headers["content-type"]
            folder = path.rpartition("/")[0]
            if path.endswith((".js", ".css", "/")):
                named = re.findall(
                    r'(?:from|import|src|href|url\()[ =]?"(?:\./)?([\w./-]+\.\w+)"', response.text
                )
                waiting += [f"{folder}/{name}" for name in named if name != "openapi.json"]
    files = {f"/web/{path.relative_to(WEB)}" for path in WEB.rglob("*") if path.is_file()}
    unused = files - set(seen)
    assert unused == {"/web/index.html", "/web/door.html", "/web/fonts/LICENSE"}
    assert seen["/web/app.js"] == "text/javascript; charset=utf-8"
    assert seen["/web/theme.css"] == "text/css; charset=utf-8"
    assert seen["/web/fonts/source-serif-4-latin.woff2"] == "font/woff2"


async def test_nothing_else_is_served(house: Houses) -> None:
    async with house().client() as client:
        for name in ("index.html", "door.html", "nothing.js", "../settings.py", "%2e%2e/cli.py"):
            check_problem(await client.get(f"/web/{name}"), 404)
        check_problem(await client.post("/"), 405)
        licence = await client.get("/web/fonts/LICENSE")
    assert "SIL OPEN FONT LICENSE" in licence.text


async def test_a_file_that_the_browser_has_is_not_sent_again(house: Houses) -> None:
    async with house().client() as client:
        first = await client.get("/web/app.js")
        again = await client.get("/web/app.js", headers={"if-none-match": first.headers["etag"]})
        other = await client.get("/web/app.js", headers={"if-none-match": '"x"'})
    assert first.headers["cache-control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")
    assert other.content == first.content


async def test_a_browser_without_a_key_finds_a_door(house: Houses) -> None:
    """401 as for everyone, with a field for the key instead of a problem; two digests let its one
    script and its style run."""
    h = house(api_keys=KEYS)
    async with h.client() as client:
        check_problem(await client.get("/"), 401)  # a program
        check_problem(await client.get("/info", headers=BROWSER), 401)
        check_problem(await client.post("/", headers=BROWSER), 401)
        for value in ("Bearer wrong", ""):
            response = await client.get("/", headers=BROWSER | {"authorization": value})
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.headers["content-type"] == "text/html; charset=utf-8"
            assert "set-cookie" not in response.headers
            assert '<input id="key" type="password"' in response.text
            policy = policy_of(response)
            assert policy["default-src"] == "'none'"
            for kind in ("script-src", "style-src"):
                assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[kind])
    assert h.counts()["requests_rejected_total:unauthorized"] == 5


async def test_the_cookie_opens_the_files_and_nothing_else(house: Houses) -> None:
    async with house(api_keys=KEYS).client() as client:
        key = {"authorization": "Bearer secret-word"}
        response = await client.get("/", headers=BROWSER | key)
        assert response.status_code == 200
        cookie = response.headers["set-cookie"]
        value = cookie.partition(";")[0]
        assert "HttpOnly" in cookie
        assert "SameSite=Lax" in cookie
        assert "Secure" not in cookie  # over plain HTTP it would be lost
        assert "secret" not in cookie
        client.cookies.clear()
        for path in ("/", "/web/app.js", "/web/fonts/LICENSE"):
            assert (await client.get(path, headers={"cookie": value})).status_code == 200
            check_problem(await client.get(path, headers={"cookie": value + "0"}), 401)
        for path in ("/info", "/metrics", "/docs", "/openapi.json", "/webx", "/nothing"):
            check_problem(await client.get(path, headers={"cookie": value}), 401)
        for path in ("/generate", "/explain", "/web/app.js"):
            check_problem(await client.post(path, json={}, headers={"cookie": value}), 401)
        # Only opening the page sets it.
        assert "set-cookie" not in (await client.get("/info", headers=BROWSER | key)).headers
        assert "set-cookie" not in (await client.get("/", headers=key)).headers
    async with house(api_keys=KEYS[1:]).client() as client:  # the key is gone
        check_problem(await client.get("/web/app.js", headers={"cookie": value}), 401)


@pytest.mark.parametrize(("scheme", "secure"), [("http", False), ("https", True)])
def test_over_tls_the_cookie_stays_there(scheme: str, secure: bool) -> None:
    cookie = playground.page_cookie({"scheme": scheme}, KEYS[0])
    assert cookie.endswith("; Secure") == secure


async def test_without_keys_there_is_no_cookie(house: Houses) -> None:
    exchange: Exchange = house().exchange(path="/", method="GET", headers=BROWSER)
    await exchange.task
    assert exchange.status == 200
    assert "set-cookie" not in exchange.headers
