"""Read a request's JSON body into its model.

pydantic parses the bytes itself: with bounds on nesting and on the digits of a number, no
lone surrogates, and the position of what is wrong.
"""

from __future__ import annotations

from typing import TypeVar

import pydantic
from starlette.requests import Request

from service.api.errors import ProblemError, invalid_body

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
        return model.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise invalid_body(error) from error
