"""What a server holds, by its /metrics."""

from __future__ import annotations

import asyncio
import time

import httpx2

HELD = {
    "requests in flight": "vitrine_requests_in_flight",
    "journal entries": "vitrine_journal_entries",
    "KV blocks referenced": 'vitrine_kv_blocks{state="referenced"}',
    "detachable requests": "vitrine_detachable_requests",
    "connections": "vitrine_http_connections",
    "asyncio tasks": "vitrine_asyncio_tasks",
}


async def samples(client: httpx2.AsyncClient, url: str) -> dict[str, float]:
    """Every sample by its name with labels, as the exposition has it."""
    text = (await client.get(url + "/metrics")).text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


async def held(client: httpx2.AsyncClient, url: str) -> dict[str, float]:
    """What is held now, by the names of `HELD`; the one that asks is among the connections."""
    found = await samples(client, url)
    return {name: found[sample] for name, sample in HELD.items()}


async def until_let_go(
    client: httpx2.AsyncClient, url: str, before: dict[str, float], limit_s: float
) -> tuple[float, dict[str, float]]:
    """Wait until no more is held than `before`: how long that took, and what is held then (after
    `limit_s` too: then it took `inf`)."""
    began = time.monotonic()
    while True:
        now = await held(client, url)
        waited_s = time.monotonic() - began
        if all(now[name] <= before[name] for name in before):
            return waited_s, now
        if waited_s > limit_s:
            return float("inf"), now
        await asyncio.sleep(0.02)
