"""From the settings: who is let in, from where, and how much each may have."""

from __future__ import annotations

import ipaddress
import logging
import re
from pathlib import Path

from service.api.keys import ApiKey, KeyFileError, parse_keys
from service.api.limits import ApiLimits
from service.settings import Settings, SettingsError

log = logging.getLogger("vitrine")

_ORIGIN = re.compile(r"https?://[a-z0-9.\-\[\]:]+")


def api_limits(settings: Settings) -> ApiLimits:
    """What the routes are told. Raises `SettingsError` for keys or origins that are none, and
    for limits of keys without keys."""
    keys = read_api_keys(settings.api_key_file, settings.api_keys)
    per_key = (settings.max_requests_per_key, settings.max_tokens_per_minute_per_key)
    if not keys and any(limit is not None for limit in per_key):
        raise SettingsError(
            "--max-requests-per-key and --max-tokens-per-minute-per-key need --api-key-file"
        )
    return ApiLimits(
        max_body_bytes=settings.max_body_bytes,
        request_timeout_s=settings.request_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        max_detachable=settings.max_detachable,
        max_detach_bytes=settings.max_detach_bytes,
        max_explain_tokens=settings.max_explain_tokens if settings.explain else 0,
        max_explain_weights=settings.max_explain_weights,
        max_explain_queue=settings.max_explain_queue,
        explain_timeout_s=settings.explain_timeout_s,
        cors_origins=read_origins(settings.cors_origins),
        max_requests_per_key=settings.max_requests_per_key,
        max_tokens_per_minute_per_key=settings.max_tokens_per_minute_per_key,
        api_keys=keys,
    )


def check_tls(settings: Settings) -> None:
    """Raises `SettingsError` for a key or authorities without a certificate."""
    if settings.tls_cert is None and (settings.tls_key or settings.tls_client_ca):
        raise SettingsError("--tls-key and --tls-client-ca need --tls-cert")


def warn_if_open(host: str, *, has_keys: bool, has_tls: bool) -> None:
    """Say it when other machines can reach a server that lets everyone in, or see its keys."""
    if is_loopback(host):
        return
    if not has_keys:
        log.warning("listening on %s without API keys: whoever reaches it may use it", host)
    elif not has_tls:
        log.warning("listening on %s without TLS: keys and texts can be read on the way", host)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_origins(text: str | None) -> tuple[str, ...]:
    """The origins in a list with commas. Raises `SettingsError` for what is no origin: it would
    match no page, silently."""
    origins = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise SettingsError(
                f"--cors-origins {origin!r}: an origin is https://name or https://name:port, in "
                "lower case and without a path"
            )
    return origins


def read_api_keys(path: Path | None, from_environment: str | None = None) -> tuple[ApiKey, ...]:
    """The keys of a file, one a line, and of VITRINE_API_KEYS, separated by commas (both as
    `service.api.keys.parse_keys` has it).

    Raises `SettingsError` for a file that cannot be read, a line that holds no key, and for no
    key at all: a server that was told to ask for keys must not run without.
    """
    if path is None and from_environment is None:
        return ()
    lines = [] if from_environment is None else from_environment.split(",")
    where = "VITRINE_API_KEYS"
    try:
        keys = parse_keys(lines)
        if path is not None:
            where = f"--api-key-file {path}"
            keys = parse_keys([*path.read_text().splitlines(), *lines])
    except (OSError, UnicodeDecodeError, KeyFileError) as error:
        raise SettingsError(f"{where}: {error}") from None
    if not keys:
        raise SettingsError(f"{where} holds no key")
    return keys
