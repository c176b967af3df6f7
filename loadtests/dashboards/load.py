"""A little of everything that clients do: streams, whole answers, several continuations, prompts
that begin alike, clients that leave, wrong requests, and more at once than the queue takes."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import httpx2

from loadtests.faults.common import Json, http_client, read_stream

SHARED = "Once upon a time there was a little glass case in a quiet old house by the sea. " * 4
WAIT_S = 0.5  # after a refusal


async def apply_load(
    url: str, seconds: float, num_clients: int, rng: random.Random
) -> Counter[str]:
    """For so long, so many clients one request after another; what they did, counted."""
    done: Counter[str] = Counter()
    until = time.monotonic() + seconds
    async with http_client() as client:
        clients = [
            _client(client, url, until, random.Random(rng.random()), done)
            for _ in range(num_clients)
        ]
        await asyncio.gather(*clients)
    return done


async def _client(
    client: httpx2.AsyncClient, url: str, until: float, rng: random.Random, done: Counter[str]
) -> None:
    kinds = {
        "stream": 10,
        "alike": 6,
        "several": 2,
        "whole": 2,
        "openai": 4,
        "leaves": 2,
        "detached": 1,
        "wrong": 1,
        "chat": 1,
        "explain": 1,
    }
    while time.monotonic() < until:
        (kind,) = rng.choices([*kinds], [*kinds.values()])
        try:
            done[await _one(client, url, kind, rng)] += 1
        except httpx2.TransportError:
            done["cut off"] += 1
        if rng.random() < 0.1:
            await asyncio.sleep(WAIT_S)


async def _one(client: httpx2.AsyncClient, url: str, kind: str, rng: random.Random) -> str:
    body: Json = {
        "prompt": [rng.randrange(1, 4000) for _ in range(rng.randrange(4, 120))],
        "max_tokens": rng.randrange(8, 160),
        "ignore_eos": True,
        "seed": rng.randrange(2**31),
    }
    path = "/generate"
    match kind:
        case "alike":
            body["prompt"] = SHARED + str(rng.randrange(1000))
        case "several":
            body["n"] = 3
        case "whole":
            body["stream"] = False
        case "detached":
            body["detach_s"] = 1
        case "wrong":
            body["temperature"] = 99
        case "openai":
            path, body = "/v1/completions", body | {"model": "stories", "stream": False}
        case "explain":
            path, body = "/explain", {"prompt": SHARED[:80]}
        case "chat":  # the bundled model cannot
            path = "/v1/chat/completions"
            body = {"model": "stories", "messages": [{"role": "user", "content": "Hello"}]}
    if kind in ("stream", "alike", "several", "detached"):
        status = (await read_stream(client, url, body)).status
    elif kind == "leaves":
        status = await _leave(client, url, body)
    else:
        status = (await client.post(url + path, json=body)).status_code
    if status == 429:
        await asyncio.sleep(WAIT_S)
        return "queue full"
    return f"{kind}: {status}"


async def _leave(client: httpx2.AsyncClient, url: str, body: Json) -> int:
    async with client.stream("POST", url + "/generate", json=body) as response:
        async for _ in response.aiter_raw():
            break
        return response.status_code
