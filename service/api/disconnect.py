"""Notice a client that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from service.api.errors import ClientGoneError

Result = TypeVar("Result")


async def until_disconnect(receive: Receive) -> None:
    """Return when the client is gone; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_while_connected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """The result of `work`; `work` is cancelled and `ClientGoneError` raised when the client
    goes away before there is one."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(until_disconnect(receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        watching.result()  # an error of the server's own channel is no disconnect
        raise ClientGoneError("it closed the connection before its answer was ready")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
