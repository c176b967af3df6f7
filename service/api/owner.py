"""Whose request it is: only the API key that made a request may resume or cancel it."""

from __future__ import annotations

from starlette.requests import Request

from service.api.limits import ApiLimits, api_key_hash


def owner_of(request: Request, limits: ApiLimits) -> str:
    """A name for the API key that the request came with; the same for everybody when the
    server asks for no key."""
    if not limits.api_key_hashes:
        return ""
    _, _, key = request.headers.get("authorization", "").partition(" ")
    return api_key_hash(key.strip().encode("latin-1")).hex()
