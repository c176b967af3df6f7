"""POST /explain: what the model does with a text."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.admission import rejections_counted
from service.api.body import read_json
from service.api.context import ApiContext
from service.api.disconnect import run_while_connected
from service.api.errors import (
    ClientGoneError,
    ProblemError,
    invalid_field,
    request_id_of,
    retry_after,
)
from service.api.explain_admission import check_wish, shown_text
from service.api.explain_answers import ExplainAnswer
from service.api.explain_checks import check_can_explain, check_enabled
from service.api.explain_schemas import ExplainRequest
from service.api.explain_writer import explanation_json
from service.api.identity import key_name_of
from service.api.openapi import describe
from service.api.visit import Ticket, visit_of
from service.engine.explain_messages import Explained
from service.explanations import Explanation
from service.metric_recording import Metrics
from service.metrics import ExplainOutcome, Outcome

log = logging.getLogger(__name__)

RETRY_AFTER_TIMEOUT_S = 10.0  # streams end; nobody knows when
_TIMEOUT = "explain-timeout"
# What the log's line and the traces say of it.
_VISIT_OUTCOMES: dict[ExplainOutcome, Outcome] = {
    "finished": "finished",
    "refused": "finished",
    "aborted": "aborted",
    "timeout": "failed",
    "failed": "failed",
}

DESCRIPTION = """What the model did with a text: the attention of every layer and head, how likely
each token was, what each layer would have said next (the logit lens), one head's equation in
numbers, and what changes when heads or edges are switched off. It is computed with the weights
that serve, in what time the streams leave: beside many it may take long, and after the server's
limit it is given up (503)."""


def routes(context: ApiContext) -> APIRouter:
    """The route, on these parts."""
    router = APIRouter(tags=["explain"])

    @router.post(
        "/explain",
        summary="See what the model does with a text",
        description=DESCRIPTION,
        **describe(ExplainRequest, ExplainAnswer, refusals=(403, 404)),
    )
    async def explain(request: Request) -> Response:
        arrived_s = asyncio.get_running_loop().time()
        limits = context.limits
        with rejections_counted(context.metrics, visit_of(request).route):
            body = await read_json(request, ExplainRequest)
            check_enabled(limits)
            shown = await shown_text(body, context, key_name_of(request))
            tokenizer, info = context.loaded()
            check_can_explain(info)
            wish = check_wish(body, len(shown.token_ids), info, limits)
            ticket = visit_of(request).begin(len(shown.token_ids) + wish.max_tokens)
            try:
                explanation = context.engine.explain(
                    shown.token_ids, wish, limits.explain_timeout_s
                )
            except Exception:
                ticket.withdraw()
                raise
        # From here on it is in flight: no await before somebody will call `end`.
        place = Place(explanation, ticket, context.metrics)
        try:
            answer = await run_while_connected(
                _answer(explanation, arrived_s, limits.explain_timeout_s), request.receive
            )
            place.compute_s = answer.compute_s
            _check_answer(answer, request_id_of(request))
            pieces = await explanation_json(
                explanation, answer, shown, tokenizer, request_id_of(request), context.model_name
            )
        except BaseException as error:
            place.end(_outcome(error))
            raise
        return PiecewiseResponse(pieces, place)

    return router


class Place:
    """An explanation's place in the server, from its admission to the last byte of its answer:
    answers are long, and as many of them as there are places lie in memory at most."""

    def __init__(self, explanation: Explanation, ticket: Ticket, metrics: Metrics) -> None:
        self.compute_s = 0.0
        self._explanation, self._ticket, self._metrics = explanation, ticket, metrics
        self._is_open = True
        metrics.explanations.accepted()

    def end(self, outcome: ExplainOutcome) -> None:
        """Its one end; later ones count for nothing."""
        if self._is_open:
            self._is_open = False
            self._explanation.close()
            self._metrics.explanations.ended(outcome, self.compute_s)
            wish = self._explanation.wish
            self._ticket.settle(
                len(self._explanation.token_ids) + wish.max_tokens, _VISIT_OUTCOMES[outcome]
            )


class PiecewiseResponse(Response):
    """Sends JSON in the pieces that it was made in; a client that reads slowly is waited for."""

    media_type = "application/json"

    def __init__(self, pieces: list[bytes], place: Place) -> None:
        self._pieces = pieces
        self._place = place
        self.status_code = 200
        self.background = None
        self.init_headers({"content-length": str(sum(map(len, pieces)))})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome: ExplainOutcome = "aborted"
        try:
            await run_while_connected(self._send_all(send), receive)
            outcome = "finished"
        except ClientGoneError:
            log.debug("the client went away while it was sent an explanation")
        finally:
            self._place.end(outcome)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _answer(explanation: Explanation, arrived_s: float, limit_s: float) -> Explained:
    """What the engine says. Raises `ProblemError` (503) when it does not in time, and
    `EngineUnavailableError` when it never will."""
    try:
        async with asyncio.timeout_at(arrived_s + limit_s):
            # The engine may answer while this is being cancelled.
            return await asyncio.shield(explanation.result)
    except TimeoutError:
        raise ProblemError(
            _TIMEOUT,
            503,
            f"there was no time for this explanation beside the streams within {limit_s:g} s",
            headers=retry_after(RETRY_AFTER_TIMEOUT_S),
        ) from None


def _check_answer(answer: Explained, request_id: str) -> None:
    """Raise `ProblemError` for one that is none."""
    if answer.refusal is not None:
        # All else was checked at the door.
        raise invalid_field("ablate", answer.refusal)
    if answer.error is not None:
        # The engine's words are for the operator: they may hold paths and addresses.
        log.error("explanation %s: the engine says: %s", request_id, answer.error)
        raise ProblemError(
            "explain-failed",
            500,
            "the engine failed on this explanation; the server's log has this request id",
        )


def _outcome(error: BaseException) -> ExplainOutcome:
    """How an explanation ended that ended with this."""
    if isinstance(error, (ClientGoneError, asyncio.CancelledError)):
        return "aborted"
    if isinstance(error, ProblemError) and error.status == 422:
        return "refused"
    if isinstance(error, ProblemError) and error.kind == _TIMEOUT:
        return "timeout"
    return "failed"
