"""Read a request's JSON body into its model.

pydantic's parser reads the bytes: with bounds on nesting and on the digits of a number, no
lone surrogates, and the position of what is wrong.
"""

from __future__ import annotations

from typing import TypeVar

import pydantic
import pydantic_core
from starlette.requests import Request

from service.api.errors import ProblemError, invalid_body

_MAX_FIELDS = 100  # more than any body has; each unknown one would be an error to tell

Body = TypeVar("Body", bound=pydantic.BaseModel)


async def read_json(request: Request, model: type[Body]) -> Body:
    """The body as a `model`.

    Raises `ProblemError`: 415 when it is not declared as JSON, 413 when it is over the limit
    (by the middleware that counts), 422 when it does not fit the model.
    """
    declared = request.headers.get("content-type", "")
    media_type = declared.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ProblemError(
            "unsupported-media-type",
            415,
            f"content-type is {declared[:80]!r}; this route needs 'application/json'",
        )
    data = await request.body()
    try:
        fields = pydantic_core.from_json(data)
    except ValueError as error:
        raise ProblemError(
            "invalid-request", 422, f"the body is not valid JSON: {error}"
        ) from error
    if isinstance(fields, dict) and len(fields) > _MAX_FIELDS:
        raise ProblemError("invalid-request", 422, f"the body has {len(fields)} fields")
    try:
        return model.model_validate(fields)
    except pydantic.ValidationError as error:
        raise invalid_body(error) from error
