"""What the routes are told by the settings; bounds of everything that a client may send."""

from __future__ import annotations

from dataclasses import dataclass

from service.api.keys import ApiKey


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """Bounds of the HTTP interface, fixed when the server starts."""

    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 60.0  # for a whole body to come
    request_timeout_s: float = 600.0  # the longest `timeout_s`, and its default
    keep_alive_s: float = 15.0  # a comment goes out after so long without an event
    max_detachable: int = 128  # requests with `detach_s` that are kept, running or ended
    max_detach_bytes: int = 4 * 2**20  # of events kept for one of them
    api_keys: tuple[ApiKey, ...] = ()  # none: every request is let in
    cors_origins: tuple[str, ...] = ()  # none: no page of another origin may call
    max_requests_per_key: int | None = None  # in flight; None: as many as the server takes
    max_tokens_per_minute_per_key: int | None = None  # prompt and max_tokens; None: any number
    max_tokenize_chars: int = 100_000
    max_detokenize_ids: int = 100_000
    tokenize_in_thread_chars: int = 8_000  # longer texts are tokenized off the event loop
