"""One HTTP request from its first byte to its last: its id, who asks, what became of it, and the
one line that the log says about it. Pure ASGI.

The line has names, lengths and times. It never has the prompt, the text, the path (a client's own
words; the route is told instead) or a key.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.continuation import combined
from service.api.errors import from_exception, problem_kind_of
from service.api.generation import Generation
from service.api.identity import key_name_of
from service.api.playground import FILES_ROUTE
from service.api.quotas import Charge, KeyQuotas
from service.api.sse import SERVER_SEND
from service.metric_recording import Metrics
from service.metrics import Outcome

log = logging.getLogger("vitrine.request")

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_STATE = "visit"
# Asked for every few seconds by machines, or dozens at a time by browsers.
_QUIET_ROUTES = ("/health/live", "/health/ready", "/metrics", FILES_ROUTE)


@dataclass(slots=True, eq=False)
class Ticket:
    """One generation of a visit. Implements `generation.Ticket`."""

    visit: Visit
    charge: Charge | None
    generation: Generation | None = None  # once it ended
    outcome: Outcome | None = None

    def withdraw(self) -> None:
        self.visit.tickets.remove(self)
        if self.charge is not None:
            self.charge.settle(0)

    def ended(self, generation: Generation, outcome: Outcome) -> None:
        self.generation, self.outcome = generation, outcome
        if self.charge is not None:
            self.charge.settle(generation.num_tokens_used)
        self.visit.check_complete()

    def settle(self, num_tokens_used: int, outcome: Outcome) -> None:
        """What was no generation ended; called once."""
        self.outcome = outcome
        if self.charge is not None:
            self.charge.settle(num_tokens_used)
        self.visit.check_complete()


@dataclass(slots=True, eq=False)
class Visit:
    """What is known of a request. Implements `generation.Caller`."""

    scope: Scope
    request_id: str
    quotas: KeyQuotas
    on_complete: Sequence[Callable[[Visit], None]]
    began_s: float = field(default_factory=time.monotonic)
    began_ns: int = field(default_factory=time.time_ns)  # Unix time
    ended_s: float | None = None  # the response's last byte, or the client's going away
    status: int | None = None  # None: nothing was answered
    tickets: list[Ticket] = field(default_factory=list)

    @property
    def key_name(self) -> str | None:
        return key_name_of(HTTPConnection(self.scope))

    @property
    def route(self) -> str:
        """The route's template; never what a client made up."""
        return getattr(self.scope.get("route"), "path", "none")

    def to_unix_ns(self, at_s: float) -> int:
        """A moment of the monotonic clock (the event loop's) as Unix time."""
        return self.began_ns + round((at_s - self.began_s) * 1e9)

    def begin(self, num_tokens: int) -> Ticket:
        key = self.key_name
        charge = None if key is None else self.quotas.take(key, num_tokens)
        ticket = Ticket(self, charge)
        self.tickets.append(ticket)
        return ticket

    def check_complete(self) -> None:
        """Report the visit once its response and all that it began have ended; a generation that
        goes on without its client is waited for."""
        if self.ended_s is not None and all(ticket.outcome for ticket in self.tickets):
            for tell in self.on_complete:
                tell(self)


def visit_of(request: HTTPConnection) -> Visit:
    """The visit that a request is."""
    visit: Visit = request.scope["state"][_STATE]
    return visit


class VisitMiddleware:
    """Gives every request an id and every response its X-Request-Id, and reports each visit when
    it is over; the last resort for exceptions that nothing inside knows."""

    def __init__(
        self,
        app: ASGIApp,
        quotas: KeyQuotas,
        metrics: Metrics,
        on_complete: Sequence[Callable[[Visit], None]],
    ) -> None:
        self.app = app
        self._metrics = metrics
        self._quotas = quotas
        self._on_complete = on_complete

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        wanted = Headers(scope=scope).get("x-request-id", "")
        request_id = wanted if _SANE_ID.fullmatch(wanted) else uuid.uuid4().hex
        visit = Visit(scope, request_id, self._quotas, self._on_complete)
        self._metrics.http_began()
        scope[SERVER_SEND] = send
        # A copy: a server may hand one dict to all requests.
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, _STATE: visit}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if visit.status is not None:
                raise
            log.exception("a request failed", extra={"id": request_id})
            await from_exception(error).response(scope)(scope, receive, send_with_id)
        finally:
            visit.ended_s = time.monotonic()
            self._metrics.http_ended(visit.route, scope["method"], visit.status)
            visit.check_complete()


def log_line(visit: Visit) -> None:
    """Say what became of a visit, in one line."""
    route, status = visit.route, visit.status
    level = logging.INFO
    if status == 500 or any(ticket.outcome == "failed" for ticket in visit.tickets):
        level = logging.ERROR
    elif route in _QUIET_ROUTES:
        level = logging.DEBUG
    log.log(level, "request", extra=_facts(visit))


def _facts(visit: Visit) -> dict[str, Any]:
    duration_s = (visit.ended_s or time.monotonic()) - visit.began_s
    client = visit.scope.get("client")
    facts: dict[str, Any] = {
        "id": visit.request_id,
        "method": visit.scope["method"],
        "route": visit.route,
        "status": visit.status,
        "key": visit.key_name,
        "client": client[0] if client else None,
        "total_s": round(duration_s, 6),
    }
    if kind := problem_kind_of(visit.scope):
        facts["problem"] = kind
    ended = [ticket.generation for ticket in visit.tickets if ticket.generation is not None]
    if ended:
        facts |= _lengths_and_times(ended)
        facts["outcome"] = sorted({str(ticket.outcome) for ticket in visit.tickets})
    return facts


def _lengths_and_times(generations: list[Generation]) -> dict[str, Any]:
    ends = [combined(one.continuations) for one in generations]
    times = [one.time_to_first_token_s for _, one in ends if one.time_to_first_token_s is not None]
    return {
        "prompt_tokens": sum(usage.prompt_tokens for usage, _ in ends),
        "cached_prompt_tokens": sum(usage.cached_prompt_tokens for usage, _ in ends),
        "completion_tokens": sum(usage.completion_tokens for usage, _ in ends),
        "queue_s": max(timing.queue_s for _, timing in ends),
        "time_to_first_token_s": min(times, default=None),
        "finish_reasons": [
            None if one.done is None else one.done.finish_reason
            for generation in generations
            for one in generation.continuations
        ],
    }
