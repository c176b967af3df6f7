"""GET /generate/{id}: go on with a stream. POST /generate/{id}/cancel: end a request."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Path
from starlette.requests import Request
from starlette.responses import Response

from service.api import answers
from service.api.answers import CancelAnswer, DoneEvent, StartEvent, TokenEvent
from service.api.context import ApiContext
from service.api.errors import ProblemError, invalid_field
from service.api.identity import key_name_of
from service.api.openapi import describe
from service.api.resumable import ResumableStream
from service.api.sse import EventStreamResponse

RESUME = """The events of a request that was made with `detach_s`: those after `Last-Event-ID`, or
all of them, with the ids and the bytes that they had the first time, and then on as they come.
A client that is still reading is told off: the stream goes on here. For the request's API key
only. 204 when it has ended and the client has seen its last event."""
CANCEL = """Ends the request, detached or not: its stream ends with `finish_reason: "cancelled"`
and what it has. For the request's API key only. To cancel twice is to cancel once."""

RequestId = Annotated[str, Path(description="The id in the `start` event, also `X-Request-Id`.")]
LastEventId = Annotated[
    str, Header(description="The id of the last event that was seen: `<request id>:<number>`.")
]


def routes(context: ApiContext) -> APIRouter:
    """The routes, on these parts."""
    router = APIRouter(tags=["generate"])

    @router.get(
        "/generate/{request_id}",
        summary="Go on with a stream",
        description=RESUME,
        **describe(None, None, events=(StartEvent, TokenEvent, DoneEvent), refusals=(404, 422)),
    )
    async def resume(
        request: Request, request_id: RequestId, last_event_id: LastEventId = ""
    ) -> Response:
        stream = context.resumable.find((key_name_of(request), request_id))
        if stream is None:
            raise ProblemError(
                "not-found",
                404,
                "no request with this id is kept; only one that was made with detach_s is, and "
                "no longer than that after its client is gone",
            )
        after = _event_number(last_event_id, request_id, stream)
        if stream.has_ended and after == len(stream.events) - 1:
            return Response(status_code=204)  # by which an EventSource knows not to come again
        attachment = stream.attach(after)
        return EventStreamResponse(
            attachment.next_chunk, attachment.close, context.limits.keep_alive_s
        )

    @router.post(
        "/generate/{request_id}/cancel",
        summary="End a request",
        description=CANCEL,
        **describe(None, CancelAnswer, refusals=(404, 422)),
    )
    async def cancel(request: Request, request_id: RequestId) -> Response:
        if await request.body() not in (b"", b"{}"):
            raise ProblemError("invalid-request", 422, "this route takes no body")
        key = (key_name_of(request), request_id)
        if context.generations.cancel(key):
            answer = CancelAnswer(request_id, "cancelled")
        elif context.resumable.find(key) is not None:
            answer = CancelAnswer(request_id, "ended")
        else:
            raise ProblemError("not-found", 404, "no request with this id is in flight")
        return Response(answers.encode(answer), media_type="application/json")

    return router


def _event_number(last_event_id: str, request_id: str, stream: ResumableStream) -> int:
    """The number in a Last-Event-ID; -1 without one. Raises `ProblemError` (422)."""
    if not last_event_id:
        return -1
    found_id, _, number = last_event_id.rpartition(":")
    if found_id != request_id or not (number.isascii() and number.isdecimal()):
        raise invalid_field(
            "Last-Event-ID",
            f"{last_event_id[:200]!r} is no event of this request; they are called "
            f"'{request_id}:<number>'",
        )
    last = len(stream.events) - 1
    if len(number) > 9 or int(number) > last:
        raise invalid_field("Last-Event-ID", f"there is no event {number[:20]}; the last is {last}")
    return int(number)
