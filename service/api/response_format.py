"""`response_format`, in OpenAI's shape: text, any JSON object, or JSON that fits a schema.

A schema is bounded in bytes and depth here; what it says is for the grammar library to judge.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from model.grammar_spec import GrammarSpec
from service.api.errors import TAG_MARK
from service.api.request_body import RequestBody

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
ANY_OBJECT = '{"type":"object"}'


def schema_text(schema: dict[str, Any]) -> str:
    """The schema as JSON; members keep their order, which is the order of the answer's."""
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse what is too deep or too long, and what the library would get wrong."""
    for place, depth in _walk(schema):
        if depth > MAX_SCHEMA_DEPTH:
            raise _refusal("nests deeper than {limit} levels", limit=MAX_SCHEMA_DEPTH)
        if isinstance(place, dict):
            _check_members(place)
    try:
        num_bytes = len(schema_text(schema).encode())
    except ValueError:
        raise _refusal("holds a number that is no JSON") from None
    if num_bytes > MAX_SCHEMA_BYTES:
        raise _refusal(
            "is {num_bytes} bytes of JSON; the limit is {limit}",
            num_bytes=num_bytes,
            limit=MAX_SCHEMA_BYTES,
        )
    return schema


def _check_members(schema: dict[str, Any]) -> None:
    if "x-guidance" in schema:
        raise _refusal("holds 'x-guidance'; the library's options are not the request's")
    fewest = schema.get("minProperties", 0)
    # The same unknown member twice counts twice for the library and once for who reads it.
    is_closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
    if isinstance(fewest, int | float) and fewest > 1 and not is_closed:
        raise _refusal(
            "has minProperties {fewest}, which is supported above 1 only beside "
            "additionalProperties false and without patternProperties",
            fewest=fewest,
        )


def _walk(schema: dict[str, Any]) -> Iterator[tuple[Any, int]]:
    """Every object and list in it with its depth, at most one level deeper than allowed."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        place, depth = waiting.pop()
        yield place, depth
        children = place.values() if isinstance(place, dict) else place
        waiting += [(child, depth + 1) for child in children if isinstance(child, dict | list)]


def _refusal(message: str, **numbers: Any) -> PydanticCustomError:
    return PydanticCustomError("json_schema", f"The schema {message}", numbers)


class TextFormat(RequestBody):
    """Any text."""

    type: Literal["text"]

    def grammar(self) -> GrammarSpec | None:
        """What the answer must fit."""
        return None


class JsonObjectFormat(RequestBody):
    """A JSON object."""

    type: Literal["json_object"]

    def grammar(self) -> GrammarSpec | None:
        """What the answer must fit."""
        return GrammarSpec("json_schema", ANY_OBJECT)


class NamedSchema(RequestBody):
    """A schema and its labels."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="A label; it has no effect.")
    description: str | None = Field(
        None,
        max_length=1024,
        description="A label; it has no effect, and the model is not shown it.",
    )
    schema_: Annotated[dict[str, Any], AfterValidator(_bounded)] = Field(
        alias="schema",
        description=f"JSON Schema; at most {MAX_SCHEMA_BYTES} bytes, {MAX_SCHEMA_DEPTH} levels. "
        "Keywords that cannot be enforced are refused. Nothing is fetched for a $ref.",
    )
    strict: bool | None = Field(
        None, description="The schema is enforced exactly, whatever this says."
    )


class JsonSchemaFormat(RequestBody):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    def grammar(self) -> GrammarSpec | None:
        """What the answer must fit."""
        return GrammarSpec("json_schema", schema_text(self.json_schema.schema_))


_FORMATS = ("text", "json_object", "json_schema")


def _kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"{TAG_MARK}{kind}" if kind in _FORMATS else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag(f"{TAG_MARK}text")]
    | Annotated[JsonObjectFormat, Tag(f"{TAG_MARK}json_object")]
    | Annotated[JsonSchemaFormat, Tag(f"{TAG_MARK}json_schema")],
    Discriminator(
        _kind,
        custom_error_type="response_format",
        custom_error_message="Input should be an object with type text, json_object or json_schema",
    ),
]
