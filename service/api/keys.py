"""API keys: how they are written down, and what the server keeps of them.

A server keeps SHA-256 digests. A plain fast hash is enough because keys are drawn by a machine
(`vitrine keys`, 256 bits): nobody can try them all, so nothing is gained by a slow one.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HASH_MARK = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_KEY_BYTES = 32
_KEY_PREFIX = "vt-"


class KeyFileError(ValueError):
    """A line that holds no usable key; the message has its number and never the key."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the server knows it."""

    name: str  # in limits, logs and as the owner of requests
    digest: bytes  # SHA-256 of the key


def api_key_hash(key: str | bytes) -> bytes:
    """What is kept of an API key: the SHA-256 digest of its (UTF-8) bytes."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def new_key(name: str) -> tuple[str, str]:
    """A fresh key, and the line that lets a server know it. Raises `KeyFileError`."""
    _check_name(name, "the name")
    key = _KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    return key, f"{name}:{HASH_MARK}{api_key_hash(key).hex()}"


def parse_keys(lines: Iterable[str]) -> tuple[ApiKey, ...]:
    """The keys in lines of `name:sha256:<hex>`, `name:key` or `key` (the name ends at the first
    colon); blank lines and lines that begin with # do not count. A key without a name is called
    `key-<line>`.

    Raises `KeyFileError` for an empty key, a name that is no word, a digest that is none, and
    for a name or a key that comes twice.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            keys.append(_parse_line(text, number))
    _check_unique(keys)
    return tuple(keys)


def _parse_line(text: str, number: int) -> ApiKey:
    name, colon, key = text.partition(":")
    if not colon:
        name, key = f"key-{number}", text
    _check_name(name, f"line {number}: the name")
    if not key:
        raise KeyFileError(f"line {number}: the key is empty")
    if not key.startswith(HASH_MARK):
        return ApiKey(name, api_key_hash(key))
    digest = key.removeprefix(HASH_MARK)
    if not _DIGEST.fullmatch(digest):
        raise KeyFileError(
            f"line {number}: after {HASH_MARK} come 64 hexadecimal digits, not {len(digest)} "
            "characters of another kind"
        )
    return ApiKey(name, bytes.fromhex(digest))


def _check_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"{what} must be 1 to 64 of the characters A-Z a-z 0-9 . _ -")


def _check_unique(keys: Sequence[ApiKey]) -> None:
    names = [key.name for key in keys]
    if twice := {name for name in names if names.count(name) > 1}:
        raise KeyFileError(f"the name {min(twice)!r} stands on several lines")
    if len({key.digest for key in keys}) < len(keys):
        raise KeyFileError("the same key stands on several lines")
