"""Streams that outlive their clients: detached, resumed, taken over, cancelled, forgotten."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.api.keys import ApiKey, api_key_hash
from tests.api.asgi_client import Exchange
from tests.api.fake_engine import FakeStream, say
from tests.api.sse_parser import Event

Houses = Callable[..., Any]

ALICE = {"authorization": "Bearer alice-key"}
BOB = {"authorization": "Bearer bob-key"}
KEYS = tuple(ApiKey(name, api_key_hash(f"{name}-key")) for name in ("alice", "bob"))


def begin(house: Any, request_id: str = "r", headers: Any = None, **body: Any) -> Exchange:
    headers = {"x-request-id": request_id, **(headers or {})}
    body = {"prompt": "a", "detach_s": 30, "seed": 1, **body}
    exchange: Exchange = house.exchange(body, headers=headers)
    return exchange


def resume(house: Any, last: str | None = None, request_id: str = "r", **headers: str) -> Exchange:
    if last is not None:
        headers["last-event-id"] = last
    path = f"/generate/{request_id}"
    exchange: Exchange = house.exchange(path=path, headers=headers, method="GET")
    return exchange


async def cancel(house: Any, request_id: str = "r", **headers: str) -> tuple[int | None, Any]:
    exchange = house.exchange(path=f"/generate/{request_id}/cancel", headers=headers)
    await exchange.finish()
    return exchange.status, json.loads(exchange.body)


async def leave(exchange: Exchange) -> list[Event]:
    """Disconnect, and what it had got."""
    exchange.disconnect()
    return await exchange.finish()


async def detached_after(house: Any, *token_ids: int, **body: Any) -> tuple[list[Event], Any]:
    """A request whose client left after these tokens: the events it saw, and its sequence."""
    exchange = begin(house, **body)
    await exchange.until_events(1)
    stream = house.engine.streams[-1]
    for count, token_id in enumerate(token_ids, start=2):
        stream.give(token_id)
        await exchange.until_events(count)
    return await leave(exchange), stream


async def test_a_stream_goes_on_where_its_client_lost_it(house: Houses) -> None:
    h = house()
    seen, stream = await detached_after(h, 65, 66)
    assert not stream.cancelled
    stream.give(67)
    again = resume(h, last="r:1")
    await again.until_events(2)
    stream.give(68)
    await again.until_events(3)
    stream.give(69, finish="length")
    events = await again.finish()
    assert events[0] == seen[2]
    assert [e.id for e in events] == [f"r:{n}" for n in range(2, 7)]
    assert [i for e in events[:-1] for i in e.json["token_ids"]] == [66, 67, 68, 69]
    assert events[-1].json["text"] == h.tokenizer.decode([65, 66, 67, 68, 69])
    assert again.headers["content-type"].startswith("text/event-stream")
    assert h.counts()["requests_finished_total:length"] == 1
    h.check_balance()


async def test_without_last_event_id_it_starts_from_the_first_event(house: Houses) -> None:
    h = house()
    seen, stream = await detached_after(h, 65)
    stream.give(finish="length")
    events = await resume(h).finish()
    assert events[:2] == seen
    assert [e.type for e in events] == ["start", "token", "done"]


async def test_nothing_changes_for_a_client_that_stays(house: Houses) -> None:
    h = house(say(65, 66))
    events = await begin(h).finish()
    assert [e.type for e in events] == ["start", "token", "token", "done"]
    assert await resume(h).finish() == events
    assert len(h.context.resumable) == 1


async def test_tokens_that_nobody_takes_come_together(house: Houses) -> None:
    h = house()
    _, stream = await detached_after(h, 65)
    for token_id in range(70, 100):
        stream.give(token_id)
        await asyncio.sleep(0.001)
    stream.give(finish="length")
    events = await resume(h, last="r:1").finish()
    assert [i for e in events if e.type == "token" for i in e.json["token_ids"]] == [
        *range(70, 100)
    ]
    assert len(events) < 10


async def test_a_stop_string_ends_it_though_nobody_reads(house: Houses) -> None:
    h = house()
    _, stream = await detached_after(h, stop="zz")
    stream.give(*h.tokenizer.encode("a zz b"))
    await wait_until(lambda: stream.cancelled)
    assert h.counts()["requests_finished_total:stop"] == 1
    assert (await resume(h).finish())[-1].json["text"] == "a "


async def test_who_comes_second_takes_over(house: Houses) -> None:
    h = house()
    first = begin(h)
    await first.until_events(1)
    second = resume(h)
    await first.finish()
    assert first.comments == [" another connection goes on with this stream"]
    h.engine.streams[0].give(65, finish="length")
    assert [e.type for e in await second.finish()] == ["start", "token", "done"]
    assert len(first.events) == 1
    h.check_balance()


async def test_a_dead_connection_that_is_noticed_late_takes_nothing_with_it(house: Houses) -> None:
    h = house()
    first = begin(h, detach_s=0.05)
    await first.until_events(1)
    first.may_send.clear()
    h.engine.streams[0].give(65)
    await first.until(lambda: first.sends_waiting)
    second = resume(h)
    await second.until_events(2)
    await leave(first)
    await asyncio.sleep(0.1)
    h.engine.streams[0].give(66, finish="length")
    assert [e.type for e in await second.finish()] == ["start", "token", "token", "done"]


async def test_it_ends_when_nobody_comes_back(house: Houses) -> None:
    h = house()
    _, stream = await detached_after(h, 65, detach_s=0.05)
    assert not stream.cancelled
    await wait_until(lambda: stream.cancelled)
    assert h.counts()["requests_aborted_total:detach-expired"] == 1
    assert await status(resume(h)) == 404
    assert (await cancel(h))[0] == 404
    await nothing_is_left(h)


async def test_an_answer_is_kept_for_the_rest_of_the_time(house: Houses) -> None:
    h = house()
    _, stream = await detached_after(h, 65, detach_s=1)
    stream.give(finish="length")
    await wait_until(lambda: h.counts().get("requests_finished_total:length") == 1)
    assert (await resume(h).finish())[-1].type == "done"  # and the time begins anew
    await wait_until(lambda: len(h.context.resumable) == 0)
    assert await status(resume(h)) == 404
    assert "requests_aborted_total" not in {k for k, v in h.counts().items() if v}
    await nothing_is_left(h)


async def test_a_client_that_has_seen_the_end_is_told_not_to_come_again(house: Houses) -> None:
    h = house(say(65))
    events = await begin(h).finish()
    again = resume(h, last=events[-1].id)
    assert await again.finish() == []
    assert again.status == 204


async def test_without_detach_s_a_client_that_goes_away_cancels(house: Houses) -> None:
    h = house()
    _, stream = await detached_after(h, 65, detach_s=0)
    assert stream.cancelled
    assert h.counts()["requests_aborted_total:client-gone"] == 1
    assert await status(resume(h)) == 404


@pytest.mark.parametrize(
    "last", ["r", "r:", "r:x", "r:-1", "r:1_0", "r:²", "q:0", ":0", "r:3", "r:" + "9" * 99]
)
async def test_an_event_that_does_not_exist_is_refused(house: Houses, last: str) -> None:
    h = house()
    await detached_after(h, 65)
    again = resume(h, last=last)
    await again.finish()
    problem = json.loads(again.body)
    assert (again.status, problem["field"]) == (422, "Last-Event-ID")


async def test_detach_s_is_bounded_and_for_streams_only(house: Houses) -> None:
    h = house()
    async with h.client() as client:
        for wrong in ({"detach_s": 301}, {"detach_s": -1}, {"detach_s": 5, "stream": False}):
            response = await client.post("/generate", json={"prompt": "a", **wrong})
            assert response.status_code == 422
            assert response.json()["field"] == "detach_s"
    assert not h.engine.streams


@pytest.mark.parametrize("detach_s", [0, 30])
async def test_cancel_ends_a_stream_with_what_it_has(house: Houses, detach_s: float) -> None:
    h = house()
    exchange = begin(h, detach_s=detach_s, n=2)
    await exchange.until_events(1)
    first, second = h.engine.streams
    first.give(65)  # not read yet when it is cancelled
    assert await cancel(h) == (200, {"id": "r", "status": "cancelled"})
    events = await exchange.finish()
    assert first.cancelled
    assert second.cancelled
    assert [e.json["finish_reason"] for e in events if e.type == "done"] == ["cancelled"] * 2
    assert [e.json["text"] for e in events if e.type == "done"] == ["a", ""]
    for _ in range(2):
        assert await cancel(h) == (200, {"id": "r", "status": "cancelled"})
    assert h.counts()["requests_finished_total:cancelled"] == 1
    h.check_balance()


async def test_cancel_ends_a_detached_request(house: Houses) -> None:
    h = house()
    seen, stream = await detached_after(h, 65)
    assert (await cancel(h))[0] == 200
    assert stream.cancelled
    events = await resume(h).finish()
    assert events[:2] == seen
    assert events[-1].json["finish_reason"] == "cancelled"
    assert events[-1].json["text"] == "a"


async def test_cancel_ends_an_answer_that_is_not_streamed(house: Houses) -> None:
    h = house()
    exchange = begin(h, detach_s=0, stream=False)
    await exchange.until(lambda: h.engine.streams)
    h.engine.streams[0].give(65)
    assert (await cancel(h))[0] == 200
    await exchange.finish()
    [choice] = json.loads(exchange.body)["choices"]
    assert (choice["finish_reason"], choice["text"]) == ("cancelled", "a")


async def test_cancel_after_the_end_changes_nothing(house: Houses) -> None:
    h = house(say(65))
    events = await begin(h).finish()
    assert await cancel(h) == (200, {"id": "r", "status": "ended"})
    assert await resume(h).finish() == events
    assert h.counts()["requests_finished_total:length"] == 1


async def test_cancel_of_nothing(house: Houses) -> None:
    h = house()
    code, problem = await cancel(h)
    assert (code, problem["status"]) == (404, 404)
    exchange = h.exchange({"reason": "bored"}, path="/generate/r/cancel")
    await exchange.finish()
    assert exchange.status == 422


async def test_another_key_sees_nothing(house: Houses) -> None:
    """Neither the stream nor that there is one: every answer is that for an unknown id."""
    h = house(api_keys=KEYS)
    exchange = begin(h, headers=ALICE)
    await exchange.until_events(1)
    for call in (h.exchange(path="/generate/r/cancel", headers=BOB), resume(h, **BOB)):
        unknown = Exchange(
            h.app,
            path=call._scope["path"].replace("/r", "/other"),
            headers=BOB,
            method=call._scope["method"],
        )
        await asyncio.gather(call.finish(), unknown.finish())
        assert call.status == unknown.status == 404
        bodies = [json.loads(one.body) | {"instance": ""} for one in (call, unknown)]
        assert bodies[0] == bodies[1]
    # The same id is free for another key, and means another request.
    second = begin(h, headers=BOB)
    await second.until_events(1)
    assert (await cancel(h, **BOB))[0] == 200
    assert [one.cancelled for one in h.engine.streams] == [False, True]
    assert await status(resume(h, **ALICE), leave_it=True) == 200


async def test_an_id_that_can_be_resumed_is_one_request(house: Houses) -> None:
    h = house()
    plain = [begin(h, detach_s=0) for _ in range(2)]  # as a proxy's trace id may be
    for one in plain:
        await one.until_events(1)
    assert await status(begin(h)) == 409
    for one in plain:
        await leave(one)
    await detached_after(h, 65)
    for detach_s in (0, 5):
        exchange = begin(h, detach_s=detach_s)
        await exchange.finish()
        problem = json.loads(exchange.body)
        assert (exchange.status, problem["field"]) == (409, "X-Request-Id")
    assert h.counts()["requests_rejected_total:id-in-use"] == 3
    h.check_balance()


async def test_how_many_are_kept_is_bounded(house: Houses) -> None:
    h = house(max_detachable=2)
    await detached_after(h, 65, request_id="one", detach_s=10)
    await detached_after(h, 65, request_id="two", detach_s=20)
    refused = begin(h, "three")
    await refused.finish()
    assert refused.status == 429
    assert 8 <= int(refused.headers["retry-after"]) <= 10
    assert "limit is 2" in json.loads(refused.body)["detail"]
    # One that was delivered to its end makes room; one that was not does not.
    h.engine.streams[0].give(finish="length")
    await wait_until(lambda: h.counts().get("requests_finished_total:length") == 1)
    assert await status(begin(h, "three")) == 429
    await resume(h, request_id="one").finish()
    third = begin(h, "three")
    await third.until_events(1)
    assert await status(resume(h, request_id="one")) == 404
    assert len(h.context.resumable) == 2
    await leave(third)


async def test_what_is_kept_of_one_is_bounded(house: Houses) -> None:
    h = house(max_detach_bytes=2_000)
    exchange = begin(h)
    await exchange.until_events(1)
    [stream] = h.engine.streams
    while not stream.cancelled:
        stream.give(65)
        await asyncio.sleep(0.002)
    events = await exchange.finish()
    assert [e.type for e in events[-2:]] == ["done", "error"]
    problem = events[-1].json
    assert (problem["status"], problem["field"]) == (507, "detach_s")
    assert "limit is 2000" in problem["detail"]
    assert h.counts()["requests_failed_total"] == 1
    assert h.counts()["detachable_bytes"] < 4_000
    assert await resume(h).finish() == events
    h.check_balance()


class Ends:
    """Pretends that its client left at an event of its choosing."""

    def __init__(self, house: Any) -> None:
        self.house = house
        self.events: list[Event] = []  # as one client would put them together

    async def read(self, exchange: Exchange, count: int) -> None:
        """Read at least `count` events more (or to the end), then leave without a word."""
        await exchange.until(lambda: len(exchange.events) >= count or exchange.task.done())
        self.events += exchange.events
        await leave(exchange)

    @property
    def has_ended(self) -> bool:
        return bool(self.events) and self.events[-1].type == "done"


@settings(suppress_health_check=list(HealthCheck), max_examples=40, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 299), min_size=1, max_size=40),
    reads=st.lists(st.integers(0, 6), max_size=8),
    pauses=st.lists(st.booleans(), min_size=1, max_size=10),
)
async def test_any_disconnects_give_the_same_stream(
    house: Houses, tokens: list[int], reads: list[int], pauses: list[bool]
) -> None:
    """Wherever a client loses its stream, and however often: no event is lost or comes twice,
    and a second client that reads all at once sees the same bytes."""
    h = house()

    async def speak(stream: FakeStream) -> None:
        for number, token_id in enumerate(tokens):
            stream.give(token_id)
            if pauses[number % len(pauses)]:
                await asyncio.sleep(0.001)
        stream.give(finish="length")

    client = Ends(h)
    exchange = begin(h)
    await exchange.until(lambda: h.engine.streams)
    speaking = asyncio.create_task(speak(h.engine.streams[0]))
    for count in [*reads, 1000]:
        await client.read(exchange, count)
        if client.has_ended:
            break
        exchange = resume(h, last=client.events[-1].id if client.events else None)
    await speaking
    assert client.has_ended
    assert [e.id for e in client.events] == [f"r:{n}" for n in range(len(client.events))]
    assert [i for e in client.events if e.type == "token" for i in e.json["token_ids"]] == tokens
    texts = "".join(e.json["text"] for e in client.events if e.type == "token")
    assert texts == client.events[-1].json["text"] == h.tokenizer.decode(tokens)
    assert await resume(h).finish() == client.events
    h.check_balance()


async def status(exchange: Exchange, *, leave_it: bool = False) -> int | None:
    if leave_it:
        await exchange.until(lambda: exchange.status is not None)
        exchange.disconnect()
    await exchange.finish()
    return exchange.status


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def nothing_is_left(house: Any) -> None:
    """No task, no request, nothing kept."""
    await wait_until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    assert len(house.context.generations) == 0
    assert house.counts()["detachable_requests"] == house.counts()["detachable_bytes"] == 0
    house.check_balance()
