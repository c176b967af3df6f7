"""GET /docs: every route, field, bound and default on one page.

Made here from /openapi.json, without scripts: the usual page loads its own from somewhere else on
the network, which a machine without one does not have and a careful operator does not want.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { border-top: 1px solid #8888; padding-top: 1rem } code { font-size: .9em }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top;
padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884 } pre { white-space: pre-wrap }
:root { color-scheme: light dark }
"""
_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
_BOUNDS = {
    "minimum": "\N{GREATER-THAN OR EQUAL TO} ",
    "exclusiveMinimum": "> ",
    "maximum": "\N{LESS-THAN OR EQUAL TO} ",
    "exclusiveMaximum": "< ",
    "minLength": "characters \N{GREATER-THAN OR EQUAL TO} ",
    "maxLength": "characters \N{LESS-THAN OR EQUAL TO} ",
    "minItems": "items \N{GREATER-THAN OR EQUAL TO} ",
    "maxItems": "items \N{LESS-THAN OR EQUAL TO} ",
}


def install(app: FastAPI) -> None:
    """Add the page; it shows the routes that are there when it is asked for."""

    async def docs(_request: Request) -> Response:
        page = render(app.openapi())
        return Response(page, media_type="text/html; charset=utf-8", headers=_HEADERS)

    app.add_route("/docs", docs, include_in_schema=False)


def render(schema: dict[str, Any]) -> str:
    """The page for an OpenAPI document."""
    title = escape(schema["info"]["title"])
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
        f"<style>{_STYLE}</style><h1>{title}</h1>",
        f"<p>{escape(schema['info'].get('description', ''))}</p>",
        '<p>For programs: <a href="openapi.json">openapi.json</a></p>',
    ]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts += _operation(schema, f"{method.upper()} {path}", operation)
    return "\n".join(parts)


def _operation(schema: dict[str, Any], name: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{escape(name)}</code></h2><p>{escape(operation.get('summary', ''))}</p>"
    if description := operation.get("description"):
        yield f"<pre>{escape(description)}</pre>"
    for media_type, body in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<h3>Body: {escape(media_type)}</h3>"
        yield from _fields(schema, body["schema"])
    yield "<h3>Answers</h3><table>"
    for status, response in operation["responses"].items():
        kinds = ", ".join(
            f"{media_type} {_kind(content.get('schema', {}))}"
            for media_type, content in response.get("content", {}).items()
        )
        yield _row(status, escape(response.get("description", "")), f"<code>{escape(kinds)}</code>")
    yield "</table>"


def _fields(schema: dict[str, Any], body: dict[str, Any]) -> Iterator[str]:
    model = _resolve(schema, body)
    yield "<table>"
    for name, field in model.get("properties", {}).items():
        default = "required" if name in model.get("required", ()) else ""
        if "default" in field:
            default = f"default {json.dumps(field['default'])}"
        facts = "; ".join(part for part in (_kind(field), *_bounds(field), default) if part)
        text = escape(field.get("description", ""))
        yield _row(f"<code>{escape(name)}</code>", escape(facts), text)
    yield "</table>"


def _resolve(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    name = part.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = schema["components"]["schemas"][name] if name else part
    return found


def _kind(part: dict[str, Any]) -> str:
    if "$ref" in part:
        return str(part["$ref"].rpartition("/")[2])
    if alternatives := part.get("anyOf") or part.get("oneOf"):
        return " or ".join(_kind(one) for one in alternatives)
    if part.get("type") == "array":
        return f"list of {_kind(part.get('items', {}))}"
    return str(part.get("type", ""))


def _bounds(part: dict[str, Any]) -> Iterator[str]:
    for key, words in _BOUNDS.items():
        if key in part:
            yield f"{words}{part[key]}"
    for alternative in part.get("anyOf") or part.get("oneOf") or ():
        yield from _bounds(alternative)


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
