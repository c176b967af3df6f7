"""Is a stream what the server promised? Every event is looked at; what is wrong becomes a line.

Of /generate: ids count up from 0 under one request id, texts concatenate to `done.text`, usage says
what was received. Of /v1/chat/completions: one id and one role, one finish reason a choice, usage
at the end, and [DONE] after which nothing follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from loadtests.load.events import Event

Json = dict[str, Any]
DONE = b"[DONE]"


@dataclass(slots=True)
class Expected:
    """What the request asked for, as far as the answer must agree with it."""

    max_tokens: int
    prompt_tokens: int | None = None  # None: text, whose tokens only the server counts
    ignore_eos: bool = False


@dataclass(slots=True)
class Received:
    """What a stream has brought so far, and what was wrong with it."""

    expected: Expected
    violations: list[str] = field(default_factory=list)
    num_tokens: int = 0  # received
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    finish_reason: str = ""
    failure: str = ""  # the server's own words in an error event
    timing: Json = field(default_factory=dict)  # the server's, of /generate
    text: list[str] = field(default_factory=list)

    def wrong(self, what: str) -> None:
        self.violations.append(what)

    def usage(self, usage: Json) -> None:
        """Compare the server's count with what was received and asked for."""
        completion = usage.get("completion_tokens")
        if completion != self.num_tokens:
            self.wrong(f"usage says {completion} tokens, {self.num_tokens} were received")
        prompt = usage.get("prompt_tokens")
        if prompt != self.prompt_tokens:
            self.wrong(f"usage says {prompt} prompt tokens, start said {self.prompt_tokens}")
        self.cached_prompt_tokens = int(usage.get("cached_prompt_tokens", 0))

    def lengths(self) -> None:
        """No more tokens than asked for, and all of them where nothing ended the text."""
        limit = self.expected.max_tokens
        if self.num_tokens > limit:
            self.wrong(f"{self.num_tokens} tokens, max_tokens is {limit}")
        if self.finish_reason == "length" and self.num_tokens != limit:
            self.wrong(f"finish_reason length after {self.num_tokens} of {limit} tokens")
        if self.expected.ignore_eos and self.finish_reason == "stop":
            self.wrong("finish_reason stop with ignore_eos")


class GenerateStream:
    """Events of POST /generate with one continuation."""

    def __init__(self, expected: Expected) -> None:
        self.received = Received(expected)
        self._request_id = ""
        self._number = -1
        self._is_over = False

    def take(self, event: Event) -> int:
        """Look at one event; the number of tokens it carries."""
        if event.data is None:  # a comment
            return 0
        received = self.received
        if self._is_over:
            received.wrong(f"an event after the last one: {event.name}")
        data: Json = msgspec.json.decode(event.data)
        self._check_id(event)
        if (self._number == 0) != (event.name == "start"):
            received.wrong(f"event {self._number} is {event.name}")
        if event.name == "token":
            received.text.append(data["text"])
            received.num_tokens += len(data["token_ids"])
            if data["index"] != 0:
                received.wrong(f"a token of index {data['index']}; there is only 0")
            return len(data["token_ids"])
        if event.name == "start":
            self._start(data)
        elif event.name == "done":
            self._done(data)
        elif event.name == "error":
            self._is_over = True
            received.finish_reason = "error"
            received.failure = str(data.get("detail") or data.get("title"))
        else:
            received.wrong(f"an event that is not known: {event.name}")
        return 0

    def end(self) -> Received:
        """The connection ended."""
        if not self._is_over:
            self.received.wrong("the stream ended without done or error")
        return self.received

    def _check_id(self, event: Event) -> None:
        self._number += 1
        name, _, number = event.id.rpartition(":")
        self._request_id = self._request_id or name
        if name != self._request_id or number != str(self._number):
            self.received.wrong(
                f"event id {event.id!r}, expected {self._request_id}:{self._number}"
            )
            self._number = int(number) if number.isdigit() else self._number

    def _start(self, data: Json) -> None:
        received, wanted = self.received, self.received.expected.prompt_tokens
        received.prompt_tokens = data["prompt_tokens"]
        if data["id"] != self._request_id:
            received.wrong(f"start.id {data['id']!r} in a stream of {self._request_id!r}")
        if wanted is not None and data["prompt_tokens"] != wanted:
            received.wrong(f"start says {data['prompt_tokens']} prompt tokens, {wanted} were sent")

    def _done(self, data: Json) -> None:
        received = self.received
        self._is_over = True
        received.finish_reason = data["finish_reason"]
        received.timing = data["timing"]
        if data["text"] != "".join(received.text):
            received.wrong("the texts of the token events are not done.text")
        received.usage(data["usage"])
        received.lengths()


class ChatStream:
    """Chunks of POST /v1/chat/completions with include_usage and one choice. They do not say how
    many tokens they carry; usage at the end does."""

    def __init__(self, expected: Expected) -> None:
        self.received = Received(expected)
        self._id = ""
        self._role = ""
        self._has_usage = self._is_over = False

    def take(self, event: Event) -> int:
        """Look at one chunk; 1 if it carries text."""
        if event.data is None:
            return 0
        received = self.received
        if self._is_over:
            received.wrong("a chunk after [DONE]")
        if event.data == DONE:
            self._is_over = True
            return 0
        data: Json = msgspec.json.decode(event.data)
        if "error" in data:
            self._is_over = True
            received.finish_reason, received.failure = "error", str(data["error"].get("message"))
            return 0
        self._id = self._id or data["id"]
        if data["id"] != self._id or data["object"] != "chat.completion.chunk":
            received.wrong(f"a {data['object']} {data['id']!r} in a stream of {self._id!r}")
        if data.get("usage"):
            self._usage(data["usage"], data["choices"])
        return sum(self._choice(choice) for choice in data["choices"])

    def end(self) -> Received:
        """The connection ended."""
        received = self.received
        if not self._is_over:
            received.wrong("the stream ended without [DONE]")
        elif not received.failure and not self._has_usage:
            received.wrong("no usage, though include_usage was set")
        elif not received.failure and not received.finish_reason:
            received.wrong("no finish_reason")
        return received

    def _usage(self, usage: Json, choices: Sequence[Json]) -> None:
        if self._has_usage or choices:
            self.received.wrong("usage in another chunk than the last")
        self._has_usage = True
        self.received.num_tokens = usage["completion_tokens"]
        self.received.prompt_tokens = usage["prompt_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        self.received.cached_prompt_tokens = int(details.get("cached_tokens") or 0)
        if usage["total_tokens"] != usage["prompt_tokens"] + usage["completion_tokens"]:
            self.received.wrong("total_tokens is not the sum of the other two")
        if not self.received.num_tokens and "".join(self.received.text):
            self.received.wrong("usage says no tokens, and there was text")
        self.received.lengths()

    def _choice(self, choice: Json) -> int:
        received, delta = self.received, choice["delta"]
        role = delta.get("role")
        if (role is None) != bool(self._role) or role not in (None, "assistant"):
            received.wrong(f"role {role!r} after {self._role!r}")
        self._role = self._role or role or "?"
        if choice["index"] != 0:
            received.wrong(f"a chunk of index {choice['index']}; there is only 0")
        if received.finish_reason:
            received.wrong("a choice after its finish_reason")
        if choice.get("finish_reason"):
            received.finish_reason = choice["finish_reason"]
        text = delta.get("content") or ""
        received.text.append(text)
        return int(bool(text))
