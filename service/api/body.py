"""Read a request's JSON body into its model.

pydantic's parser reads the bytes: with bounds on nesting and on the digits of a number, no
lone surrogates, and the position of what is wrong.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

import msgspec
import pydantic
import pydantic_core
from starlette.requests import Request

from service.api.context import ApiContext
from service.api.errors import ProblemError, invalid_body, invalid_field

_MAX_FIELDS = 100  # more than any body has; each unknown one would be an error to tell
# The event loop has time for this much between two tokens; more is parsed in a thread.
_INLINE_BYTES = 64 * 1024

Body = TypeVar("Body", bound=pydantic.BaseModel)

_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def read_json(request: Request, model: type[Body]) -> Body:
    """The body as a `model`.

    Raises `ProblemError`: 415 when it is not declared as JSON, 413 when it is over the limit
    and 408 when it does not come (by the middleware that counts), 422 when it does not fit the
    model or names a field twice.
    """
    declared = request.headers.get("content-type", "")
    media_type = declared.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ProblemError(
            "unsupported-media-type",
            415,
            f"content-type is {declared[:80]!r}; this route needs 'application/json'",
        )
    data = await request.body()
    max_values = _max_values(request.app.state.context)
    if len(data) <= _INLINE_BYTES:
        return _parse(data, model, max_values)
    return await asyncio.to_thread(_parse, data, model, max_values)


def _max_values(context: ApiContext) -> int:
    """More values than this in one field are of no use: a prompt would not fit the context."""
    info = context.engine.info
    context_length = 0 if info is None else info.context_length
    return max(context_length, context.limits.max_detokenize_ids)


def _parse(data: bytes, model: type[Body], max_values: int) -> Body:
    # A thread does not help while one call holds the interpreter: what takes long to build is
    # refused unbuilt.
    _check_lengths(data, max_values)
    try:
        fields = pydantic_core.from_json(data)
        if isinstance(fields, dict) and len(fields) > _MAX_FIELDS:
            raise ProblemError("invalid-request", 422, f"the body has {len(fields)} fields")
        _check_names(data)
    except ValueError as error:
        raise ProblemError(
            "invalid-request", 422, f"the body is not valid JSON: {error}"
        ) from error
    try:
        return model.model_validate(fields)
    except pydantic.ValidationError as error:
        raise invalid_body(error) from error


def _check_lengths(data: bytes, max_values: int) -> None:
    """Refuse a list or an object of far too many values by counting its commas."""
    if data.count(b",") <= max_values:
        return
    try:
        members = _members.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return  # the parser says better what is wrong, and stops at the same place
    if len(members) > _MAX_FIELDS:
        raise ProblemError("invalid-request", 422, f"the body has {len(members)} fields")
    for name, raw in members.items():
        value = bytes(raw)
        num_values = value.count(b",") + 1
        if value[:1] in (b"[", b"{") and num_values > max_values:
            raise invalid_field(
                name[:80],
                f"{num_values} values are more than any request can use; the limit is {max_values}",
            )


def _check_names(data: bytes) -> None:
    """Raise `ValueError` for a name that stands twice in one object: which of the two counts
    would depend on the reader. Only after a parser that bounds the nesting."""
    # Numbers are not looked at again: their text is as good.
    json.loads(data, object_pairs_hook=_unique, parse_int=str, parse_float=str, parse_constant=str)


def _unique(pairs: list[tuple[str, Any]]) -> None:
    names = {name for name, _ in pairs}
    if len(names) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name[:80]!r} stands twice in one object")
            seen.add(name)
