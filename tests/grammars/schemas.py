"""Random JSON schemas whose texts are short: for tests that let a model write them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

names = st.sampled_from(["a", "name", "x y", "été", "a/b", 'q"q', "$ref", "type"])
# Without DEL: the library finds no text for a constant of it, and such a schema is refused.
texts = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="\x7f"), max_size=6
)


@st.composite
def integers(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(-1000, 1000))
    bounds = draw(
        st.sampled_from([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
    )
    return {"type": "integer", bounds[0]: low, bounds[1]: low + draw(st.integers(2, 500))}


@st.composite
def strings(draw: st.DrawFn) -> Schema:
    shortest = draw(st.integers(0, 4))
    return {
        "type": "string",
        "minLength": shortest,
        "maxLength": shortest + draw(st.integers(0, 6)),
    }


values = st.none() | st.booleans() | st.integers(-99, 99) | texts
leaves: st.SearchStrategy[Schema] = (
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["null", "boolean"]},
            {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]{2}$"},
            {"type": "string", "format": "date"},
            {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
        ]
    )
    | integers()
    | strings()
    | st.builds(lambda v: {"const": v}, values)
    | st.builds(lambda v: {"enum": v}, st.lists(values, min_size=1, max_size=4, unique_by=repr))
)


@st.composite
def arrays(draw: st.DrawFn, items: st.SearchStrategy[Schema]) -> Schema:
    fewest = draw(st.integers(0, 2))
    schema: Schema = {"type": "array", "items": draw(items), "minItems": fewest}
    schema["maxItems"] = fewest + draw(st.integers(0, 2))
    if draw(st.booleans()):
        schema["prefixItems"] = draw(st.lists(items, min_size=1, max_size=2))
    return schema


@st.composite
def objects(draw: st.DrawFn, members: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(names, members, max_size=4))
    schema: Schema = {"type": "object", "properties": properties, "required": list(properties)}
    if draw(st.booleans()):
        optional = draw(st.sets(st.sampled_from([*properties, None])))
        schema["required"] = [name for name in properties if name not in optional]
        schema["additionalProperties"] = False
    else:  # one more, or the model goes on for ever; supported where all others are required
        schema["additionalProperties"] = draw(members)
        schema["maxProperties"] = len(properties) + 1
    return schema


def _branches(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    any_of = st.builds(lambda s: {"anyOf": s}, st.lists(inner, min_size=1, max_size=3))
    shared = st.builds(
        lambda shared, items: {
            "$defs": {"shared": shared},
            "type": "array",
            "items": {"anyOf": [{"$ref": "#/$defs/shared"}, items]},
            "maxItems": 2,
        },
        inner,
        leaves,
    )
    return arrays(inner) | objects(inner) | any_of | shared


# A $ref is resolved from the root, so `$defs` stay there.
_inner = st.recursive(leaves, lambda s: arrays(s) | objects(s), max_leaves=5)
schemas: st.SearchStrategy[Schema] = _inner | _branches(_inner)
