"""The chat template of a checkpoint: a Jinja text that turns messages into a prompt.

Only read here. It is a program by whoever made the checkpoint; what runs it, and within
which bounds, is chat_rendering.py and service/template_worker.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 2**20  # published ones have up to some 30 kB
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ChatTemplateError(ValueError):
    """A chat template is broken, cannot be read, or does not take these messages."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template's text, and the special tokens that it may name."""

    source: str
    special_tokens: dict[str, str]  # "bos_token" -> its text, and so on


def read_chat_template(directory: Path, override: Path | None = None) -> ChatTemplate | None:
    """The template in a checkpoint directory, or the one in the file `override`; None when there
    is none.

    As transformers has it: chat_template.jinja goes before `chat_template` in
    tokenizer_config.json, which is a string, or a list of named ones of which "default" counts.

    Raises `ChatTemplateError` for files that cannot be read or have another shape.
    """
    config = _read_object(directory / "tokenizer_config.json")
    if override is not None:
        source: str | None = _read_text(override)
    elif (directory / TEMPLATE_FILE).is_file():
        source = _read_text(directory / TEMPLATE_FILE)
    else:
        source = _default(config.get("chat_template"))
    if source is None:
        return None
    older = _read_object(directory / "special_tokens_map.json")
    return ChatTemplate(source, _special_tokens({**older, **config}))


def _default(found: object) -> str | None:
    """`chat_template` of tokenizer_config.json, in either of its shapes."""
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        if len(named) != len(found) or not named:
            raise ChatTemplateError(
                "tokenizer_config.json: chat_template is a list, but not of named templates"
            )
        if "default" not in named:
            raise ChatTemplateError(
                f"tokenizer_config.json: no chat_template is named 'default', only "
                f"{', '.join(sorted(map(repr, named)))[:200]}"
            )
        found = named["default"]
    if found is None:
        return None
    if not isinstance(found, str):
        raise ChatTemplateError(
            f"tokenizer_config.json: chat_template is a {type(found).__name__}, not a string"
        )
    _check_size("tokenizer_config.json: chat_template", len(found.encode("utf-8", "replace")))
    return found


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the special tokens, which are given as strings or as {"content": string}."""
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _read_text(path: Path) -> str:
    try:
        _check_size(path.name, path.stat().st_size)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(f"{path.name} cannot be read: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ChatTemplateError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ChatTemplateError(f"{path.name} is no JSON object")
    return found


def _check_size(what: str, num_bytes: int) -> None:
    if num_bytes > MAX_TEMPLATE_BYTES:
        raise ChatTemplateError(
            f"{what} has {num_bytes} bytes; the limit is {MAX_TEMPLATE_BYTES} bytes"
        )
