"""What one API key may have at a time: buckets by a clock of the test's, and over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from service.api.errors import ProblemError
from service.api.keys import parse_keys
from service.api.quotas import KeyQuotas, TokenBucket
from service.client import QueueFullError
from tests.api.fake_engine import say
from tests.api.test_http import check_problem

Houses = Callable[..., Any]
KEYS = parse_keys(["alice:one", "bob:two"])
ALICE, BOB = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}


class Clock:
    """Seconds, as the test says."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_tells_the_exact_wait() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    assert bucket.take(60) == 0
    assert bucket.take(30) == 30
    clock.now_s += 29.5
    assert bucket.take(30) == pytest.approx(0.5)
    clock.now_s += 0.5
    assert bucket.take(30) == 0
    assert bucket.take(1) == pytest.approx(1)


def test_a_bucket_holds_a_minute_s_worth_and_no_more() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    clock.now_s += 3600
    assert bucket.take(61) > 0
    bucket.give_back(1000)
    assert bucket.take(61) > 0
    assert bucket.take(60) == 0


def test_what_was_not_used_goes_back_once() -> None:
    quotas = KeyQuotas(None, 100, Clock())
    charge = quotas.take("alice", 80)
    with pytest.raises(ProblemError) as refused:
        quotas.take("alice", 80)
    assert (refused.value.kind, refused.value.headers["Retry-After"]) == ("key-rate", "36")
    quotas.take("bob", 80)
    charge.settle(20)
    charge.settle(20)
    quotas.take("alice", 80)
    with pytest.raises(ProblemError):
        quotas.take("alice", 1)


def test_requests_in_flight_and_how_long_until_one_ends() -> None:
    clock = Clock()
    quotas = KeyQuotas(2, None, clock)
    charges = [quotas.take("alice", 1) for _ in range(2)]
    clock.now_s += 8
    charges[0].settle(1)
    charges.append(quotas.take("alice", 1))
    with pytest.raises(ProblemError, match="2 requests in flight; its limit is 2") as refused:
        quotas.take("alice", 1)
    assert refused.value.headers["Retry-After"] == "8"  # one ended in 8 s
    quotas.take("bob", 1)


async def test_tokens_of_a_key_over_http(house: Houses) -> None:
    h = house(say(5, 6), api_keys=KEYS, max_tokens_per_minute_per_key=60)
    body = {"prompt": [1] * 10, "max_tokens": 40, "stream": False}
    async with h.client() as client:
        # 50 are charged, 12 used, and 38 come back.
        assert (await client.post("/generate", json=body, headers=ALICE)).status_code == 200
        body["max_tokens"] = 48
        response = await client.post("/generate", json=body, headers=ALICE)
        problem = check_problem(response, 429)
        assert problem["type"].endswith(":key-rate")
        assert "'alice' may take 60 a minute" in problem["detail"]
        assert 8 <= int(response.headers["retry-after"]) <= 10
        assert (await client.post("/generate", json=body, headers=BOB)).status_code == 200
        body["max_tokens"] = 51
        problem = check_problem(await client.post("/generate", json=body, headers=BOB), 422)
        assert problem["field"] == "max_tokens"
    assert h.counts()["requests_rejected_total:key-rate"] == 1
    h.check_balance()


async def test_requests_of_a_key_over_http(house: Houses) -> None:
    h = house(api_keys=KEYS, max_requests_per_key=1)
    first = h.exchange({"prompt": "a"}, headers=ALICE)
    await first.until_events(1)
    async with h.client() as client:
        body = {"prompt": "a"}
        response = await client.post("/generate", json=body, headers=ALICE)
        assert check_problem(response, 429)["type"].endswith(":key-concurrency")
        assert int(response.headers["retry-after"]) >= 1
        other = h.exchange(body, headers=BOB)
        await other.until_events(1)
        first.disconnect()
        await first.finish()
        again = h.exchange(body, headers=ALICE)
        await again.until_events(1)
    for exchange in (other, again):
        exchange.disconnect()
        await exchange.finish()
    h.check_balance()


async def test_tokens_that_nobody_read_are_charged(house: Houses) -> None:
    """A client that asks, does not read and goes away has used the machine all the same."""
    h = house(api_keys=KEYS, max_tokens_per_minute_per_key=60)
    exchange = h.exchange({"prompt": [1], "max_tokens": 40}, headers=ALICE)
    exchange.may_send.clear()
    await exchange.until(lambda: h.engine.streams)
    h.engine.streams[0].give(*[5] * 39)
    exchange.disconnect()
    await asyncio.sleep(0)
    exchange.may_send.set()
    await exchange.finish()
    async with h.client() as client:
        body = {"prompt": [1], "max_tokens": 29}
        check_problem(await client.post("/generate", json=body, headers=ALICE), 429)


async def test_what_the_engine_refuses_costs_nothing(house: Houses) -> None:
    limits = {"max_tokens_per_minute_per_key": 60, "max_requests_per_key": 1}
    h = house(say(5), api_keys=KEYS, **limits)
    body = {"prompt": [1], "max_tokens": 59, "stream": False}
    async with h.client() as client:
        h.engine.refuse = QueueFullError("full", 1)
        for _ in range(3):
            check_problem(await client.post("/generate", json=body, headers=ALICE), 429)
        h.engine.refuse = None
        assert (await client.post("/generate", json=body, headers=ALICE)).status_code == 200
