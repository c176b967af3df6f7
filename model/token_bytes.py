"""Which bytes a token stands for: the `decoder` of a tokenizer.json, read as rules per token.

All decoders of the families we serve (byte-level BPE; SentencePiece's Metaspace and byte
fallback) treat each token alone, but for the first of a text. So a token is a constant string
of bytes and a text is their concatenation: that is what makes decoding a stream cheap.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

EACH_BYTE = "vitrine-replace-each-byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for every byte that is in no character, as SentencePiece does."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


class DecoderUnsupportedError(ValueError):
    """The tokenizer.json names a decoder that has no per-token rules here."""


@dataclass(frozen=True, slots=True)
class ByteRules:
    """How a token becomes bytes, and what is done at the start of a text."""

    token: Callable[[str], bytes]
    first_token: Callable[[str], bytes]  # for the first token of a text
    byte_level: bool = False  # a character of a token is a byte of the text
    errors: str = "replace"  # codecs error handler for bytes that are no UTF-8
    strip_char: str = " "
    strip_start: int = 0  # so many of these characters at the start of a text are left out


def byte_rules(decoder: dict[str, Any] | None) -> ByteRules:
    """Rules of a tokenizer.json's `decoder`; None (no decoder) joins tokens with spaces.

    Raises `DecoderUnsupportedError`, naming the decoder, for one that it cannot express.
    """
    if decoder is None:
        return ByteRules(
            token=lambda token: b" " + token.encode(), first_token=lambda token: token.encode()
        )
    steps = _flatten(decoder)
    kinds = [step["type"] for step in steps]
    per_token, rest = _split_at_fuse(kinds, steps)
    rewrites: list[tuple[str, str, str]] = []  # (what, by what, by what in the first token)
    byte_level = byte_fallback = False
    for step in per_token:
        match step["type"]:
            case "Replace":
                what = _literal_pattern(step)
                rewrites.append((what, step["content"], step["content"]))
            case "Metaspace":
                first = "" if _drops_first_space(step) else " "
                rewrites.append((step["replacement"], " ", first))
            case "ByteFallback":
                byte_fallback = True
            case "ByteLevel":
                byte_level = True
            case other:
                raise DecoderUnsupportedError(f"decoder {other} in {kinds} is not supported")
    if byte_level and byte_fallback:
        raise DecoderUnsupportedError(f"decoders {kinds} together are not supported")
    strip_char, strip_start = _strip(rest, kinds)

    def to_bytes(token: str, first: bool) -> bytes:
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for what, by, by_in_first in rewrites:
            token = token.replace(what, by_in_first if first else by)
        return _from_byte_alphabet(token) if byte_level else token.encode()

    return ByteRules(
        token=lambda token: to_bytes(token, False),
        first_token=lambda token: to_bytes(token, True),
        byte_level=byte_level,
        errors=EACH_BYTE if byte_fallback else "replace",
        strip_char=strip_char,
        strip_start=strip_start,
    )


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _split_at_fuse(
    kinds: list[str], steps: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Steps that see single tokens, and steps that see the whole text."""
    if "Fuse" in kinds:
        at = kinds.index("Fuse")
        return steps[:at], [step for step in steps[at:] if step["type"] != "Fuse"]
    if "ByteLevel" in kinds:  # it joins the tokens too
        at = kinds.index("ByteLevel") + 1
        return steps[:at], steps[at:]
    return steps, []


def _strip(rest: list[dict[str, Any]], kinds: list[str]) -> tuple[str, int]:
    """The character and how many of it a text loses at its start."""
    if not rest:
        return " ", 0
    step = rest[0]
    # Stripping the end would hold back text until the end is known.
    if len(rest) > 1 or step["type"] != "Strip" or step["stop"]:
        raise DecoderUnsupportedError(f"decoders {kinds}: only a Strip at the start may be last")
    return step["content"], step["start"]


def _literal_pattern(step: dict[str, Any]) -> str:
    pattern = step["pattern"]
    if "String" not in pattern:
        raise DecoderUnsupportedError(f"decoder Replace with the pattern {pattern} is no string")
    literal: str = pattern["String"]
    return literal


def _drops_first_space(step: dict[str, Any]) -> bool:
    if "prepend_scheme" in step:
        return bool(step["prepend_scheme"] != "never")
    return bool(step.get("add_prefix_space", True))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others, in order,
    for the characters from U+0100 on (Radford et al. 2019, released code)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


def _from_byte_alphabet(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        # An added token is plain text, not in the alphabet: it stands for itself.
        return token.encode()
