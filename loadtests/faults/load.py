"""The load the fault scripts break things under: streams with known texts, run again and again."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

import httpx2

from loadtests.faults.common import Json, Stream, read_stream

OPENINGS = (
    "Once upon a time",
    "The little dog",
    "One day, a girl named Lily",
    "Tom and his sister went to the park because",
    "There was a big tree. In the tree lived",
)


def bodies(rng: random.Random, count: int, max_tokens: int) -> list[Json]:
    """Requests of mixed length, each with a seed of its own."""
    return [
        {
            "prompt": rng.choice(OPENINGS),
            "seed": rng.randrange(2**31),
            "max_tokens": rng.randint(max(1, max_tokens // 4), max_tokens),
            "ignore_eos": True,
        }
        for _ in range(count)
    ]


async def undisturbed(client: httpx2.AsyncClient, url: str, requests: list[Json]) -> list[Stream]:
    """What each request gives when nothing is broken."""
    streams = await asyncio.gather(*(read_stream(client, url, body) for body in requests))
    for stream in streams:
        if stream.finish_reason != "length":
            raise RuntimeError(f"an undisturbed stream ended so: {stream.status} {stream.last}")
    return list(streams)


@dataclass(slots=True)
class Comparison:
    """Streams against what they give undisturbed. Counts are tokens, except `streams`."""

    streams: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    unfinished: list[str] = field(default_factory=list)  # how streams ended that did not finish
    stamps: list[float] = field(default_factory=list)  # of all token events
    last_token_at: float = 0.0  # of streams that still run, too

    def token_came(self) -> None:
        """On a stream that runs."""
        self.last_token_at = time.monotonic()

    def add(self, got: Stream, expected: Stream) -> None:
        """Book one stream."""
        self.streams += 1
        self.stamps += got.stamps
        if got.finish_reason != "length":
            self.unfinished.append(f"{got.status} {got.last_event} {got.last}"[:300])
            return
        missing = len(expected.token_ids) - len(got.token_ids)
        self.lost += max(0, missing)
        self.doubled += max(0, -missing)
        pairs = zip(got.token_ids, expected.token_ids, strict=False)
        self.wrong += sum(ours != theirs for ours, theirs in pairs)
        if "".join(got.texts) != expected.last["text"] or got.last["text"] != expected.last["text"]:
            self.wrong += 1

    @property
    def figures(self) -> dict[str, object]:
        """For the report."""
        return {
            "streams compared": self.streams,
            "tokens lost": self.lost,
            "tokens doubled": self.doubled,
            "tokens or texts that differ": self.wrong,
            "streams that did not finish": len(self.unfinished),
        }

    @property
    def is_clean(self) -> bool:
        """Nothing lost, doubled, changed or cut off."""
        return not (self.lost or self.doubled or self.wrong or self.unfinished)


async def repeat(
    client: httpx2.AsyncClient,
    url: str,
    requests: list[Json],
    expected: list[Stream],
    comparison: Comparison,
    stop: asyncio.Event,
) -> None:
    """Run every request again and again at once until `stop`; the last round is finished."""

    async def one(body: Json, undisturbed: Stream) -> None:
        while not stop.is_set():
            began = time.monotonic()
            got = await read_stream(client, url, body, comparison.token_came)
            comparison.add(got, undisturbed)
            if time.monotonic() - began < 0.01:  # refused at the door: not a busy loop
                await asyncio.sleep(0.1)

    await asyncio.gather(*(one(b, e) for b, e in zip(requests, expected, strict=True)))


def quantile(values: list[float], q: float) -> float:
    """The value below which a share `q` lies (the next one that was measured)."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
