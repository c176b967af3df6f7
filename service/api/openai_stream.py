"""What OpenAI's two routes share: the check of the model's name, the stream and the answer.

A route brings a `Shape`, which puts the items of a generation into its chunks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from service.api import answers, openai_answers
from service.api.context import ApiContext
from service.api.continuation import Delta, Done
from service.api.disconnect import run_while_connected
from service.api.errors import ProblemError, invalid_field
from service.api.generation import Failed, Generation
from service.api.openai_answers import CompletionUsage
from service.api.openai_schemas import OpenAIRequest
from service.api.sse import EventStreamResponse, format_data
from service.api.whole import Whole, whole_continuations
from service.client import NeverFitsError

_END = format_data(b"[DONE]")


@dataclass(frozen=True, slots=True)
class Header:
    """What every chunk of an answer begins with."""

    id: str
    created: int  # Unix time in seconds
    model: str
    system_fingerprint: str


class Shape(Protocol):
    """How one route words an answer."""

    def chunks(
        self, item: Delta | Done, usage: CompletionUsage | UnsetType | None
    ) -> Sequence[msgspec.Struct]:
        """The chunks that say this item; `usage` goes into each."""
        ...

    def last_chunk(self, usage: CompletionUsage) -> msgspec.Struct:
        """The chunk without choices."""
        ...

    def whole(self, wholes: Sequence[Whole], usage: CompletionUsage) -> msgspec.Struct:
        """The answer that is not streamed."""
        ...


def check_model(name: str, context: ApiContext) -> None:
    """Raise `ProblemError` (404) for a model that is not served here."""
    if name != context.model_name:
        raise ProblemError(
            "model-not-found",
            404,
            f"model: {name[:80]!r} is not served here; this server has {context.model_name!r}",
            field="model",
        )


def make_header(prefix: str, request_id: str, context: ApiContext) -> Header:
    """`prefix` is the beginning of the answer's id, by which clients know its kind."""
    _, info = context.loaded()
    name = context.model_name
    fingerprint = openai_answers.fingerprint(name, info)
    return Header(f"{prefix}-{request_id}", int(time.time()), name, fingerprint)


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Refusals of fields of /generate speak of the fields that the client sent."""
    try:
        yield
    except ProblemError as error:
        if error.field is None or error.field not in names:
            raise
        detail = error.detail.removeprefix(f"{error.field}: ")
        raise invalid_field(names[error.field], detail, code=error.code) from error
    except NeverFitsError as error:
        raise NeverFitsError(str(error), names.get(error.field, error.field)) from error


async def respond(
    request: Request,
    context: ApiContext,
    body: OpenAIRequest,
    generation: Generation,
    shape: Shape,
) -> Response:
    """Answer an admitted request; to be awaited at once, as it is what calls `abort`."""
    if body.stream:
        writer = ChunkWriter(generation, shape, body)
        return EventStreamResponse(writer.next_chunk, generation.abort, context.limits.keep_alive_s)
    try:
        wholes = await run_while_connected(whole_continuations(generation), request.receive)
    finally:
        generation.abort()
    usage = openai_answers.usage(generation.continuations, body.n)
    return Response(answers.encode(shape.whole(wholes, usage)), media_type="application/json")


class ChunkWriter:
    """Writes a generation's items as chunks, then the usage if asked for, then [DONE]. After an
    error nothing follows."""

    def __init__(self, generation: Generation, shape: Shape, body: OpenAIRequest) -> None:
        self._generation = generation
        self._shape = shape
        self._per_prompt = body.n
        self._include_usage = body.include_usage
        self._is_over = False

    async def next_chunk(self) -> bytes | None:
        """The bytes of all chunks that are ready, at least one; None after the last."""
        data = b""
        while not data:
            if self._is_over:
                return None
            items = await self._generation.next()
            data = b"".join([self._written(item) for item in items]) if items else self._end()
        return data

    def _written(self, item: Delta | Done | Failed) -> bytes:
        if isinstance(item, Failed):
            self._is_over = True
            return format_data(answers.encode(item.error.openai_error()))
        # With usage at the end, OpenAI has a null of it in all other chunks.
        usage = None if self._include_usage else UNSET
        chunks = self._shape.chunks(item, usage)
        return b"".join([format_data(answers.encode(chunk)) for chunk in chunks])

    def _end(self) -> bytes:
        self._is_over = True
        if not self._include_usage:
            return _END
        usage = openai_answers.usage(self._generation.continuations, self._per_prompt)
        return format_data(answers.encode(self._shape.last_chunk(usage))) + _END
