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
    max_explain_tokens: int = 256  # of a text; 0: /explain and `explain` are switched off
    max_explain_weights: int = 4 * 2**20  # attention weights in an answer of /explain
    max_explain_recorded: int = 128 * 2**20  # that the engine keeps to make the answer
    max_explain_lens: int = 128 * 2**10  # candidates of all layers and positions
    max_explain_stream_tokens: int = 2048  # n * max_tokens of a request with `explain`
    max_explain_queue: int = 8  # explanations that run, wait or are being sent
    explain_timeout_s: float = 60.0  # from arrival to answer
    max_tokenize_chars: int = 100_000
    max_detokenize_ids: int = 100_000
    tokenize_in_thread_chars: int = 8_000  # longer texts are tokenized off the event loop
