"""Streams against a URL, and how each ended: the clients of verify.py."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import httpx2

# `lost` had not begun when it failed: nobody had promised it anything, and it could be sent again.
# `broken` had begun, and its stream ended without its last event.
Ending = Literal["finished", "refused", "lost", "broken"]


@dataclass
class Stream:
    """One request: what came of it, and when."""

    ending: Ending = "lost"
    why: str = ""
    id: str = ""
    text: str = ""
    num_tokens: int = 0
    cached_tokens: int = 0
    token_times: list[float] = field(default_factory=list)  # seconds of time.monotonic()


async def generate(client: httpx2.AsyncClient, headers: dict[str, str], **body: object) -> Stream:
    """POST /generate and read the stream to its end. Raises nothing of the network's."""
    stream = Stream()
    try:
        async with client.stream("POST", "/generate", json=body, headers=headers) as response:
            if response.status_code != 200:
                # Whatever is not 429 is no answer of a server that works.
                stream.ending = "refused" if response.status_code == 429 else "lost"
                stream.why = f"{response.status_code} {(await response.aread())[:200]!r}"
                return stream
            await read(response, stream)
    except httpx2.HTTPError as error:
        stream.why = f"{type(error).__name__}: {error}"
    return stream


async def read(response: httpx2.Response, stream: Stream) -> None:
    """Events into `stream` until they end."""
    event, texts = "", ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
            continue
        if not line.startswith("data: "):
            continue
        data = json.loads(line.removeprefix("data: "))
        if event == "start":
            stream.ending, stream.why, stream.id = (
                "broken",
                "ended without its last event",
                data["id"],
            )
        elif event == "token":
            texts += data["text"]
            stream.token_times.append(time.monotonic())
        elif event == "done":
            stream.text, stream.num_tokens = data["text"], data["usage"]["completion_tokens"]
            stream.cached_tokens = data["usage"]["cached_prompt_tokens"]
            stream.ending = "finished" if texts == data["text"] else "broken"
            stream.why = data["finish_reason"]
        elif event == "error":
            stream.ending, stream.why = "broken", json.dumps(data)


@dataclass
class Load:
    """So many clients, each with one request after another until told to stop."""

    url: str
    num_streams: int
    max_tokens: int
    streams: list[Stream] = field(default_factory=list)
    is_over: bool = False

    async def run(self) -> None:
        """Until `is_over`, and what runs then is read to its end."""
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._one_client(client, i) for i in range(self.num_streams)))

    async def _one_client(self, client: httpx2.AsyncClient, number: int) -> None:
        seed = number * 1_000_000
        while not self.is_over:
            seed += 1
            body = {"prompt": "Once upon a time", "seed": seed, "ignore_eos": True}
            self.streams.append(await generate(client, {}, max_tokens=self.max_tokens, **body))

    def endings(self) -> Counter[Ending]:
        """How many ended how."""
        return Counter(stream.ending for stream in self.streams)

    def tokens_per_s(self, began: float, ended: float) -> float:
        """Tokens that came between two times of `time.monotonic()`, a second."""
        times = (t for stream in self.streams for t in stream.token_times)
        events = sum(began <= t <= ended for t in times)
        finished = [stream for stream in self.streams if stream.ending == "finished"]
        per_event = sum(s.num_tokens for s in finished) / sum(len(s.token_times) for s in finished)
        return events * per_event / (ended - began)
