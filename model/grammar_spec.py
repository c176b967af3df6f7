"""What a request may ask of the form of its text. No library and no torch here: the API
process, the messages and the engine all read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GrammarKind = Literal["regex", "lark", "json_schema"]
_FIELDS: dict[GrammarKind, str] = {
    "regex": "regex",
    "lark": "grammar",
    "json_schema": "response_format",
}


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A language that the whole continuation must belong to."""

    kind: GrammarKind
    text: str  # the regular expression, the Lark grammar, or the schema as JSON

    @property
    def field(self) -> str:
        """The request's field that it came in."""
        return _FIELDS[self.kind]
