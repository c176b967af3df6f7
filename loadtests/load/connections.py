"""How long a user's client takes to connect.

A user keeps its connection from one request to the next, as browsers and OpenAI's clients do; an
open loop keeps as many as it needed at a time. geventhttpclient has no hook for it, so its pool of
connections gets a way of making one that looks at the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from locust.contrib.fasthttp import FastHttpSession


def time_connecting(session: FastHttpSession, told: Callable[[int], None]) -> None:
    """From now on `told` hears of each new connection to the session's host and the ns it took, in
    the greenlet that waited for it."""
    pool = session.client.clientpool.get_client(session.base_url)._connection_pool
    connect = pool._create_socket

    def timed() -> Any:
        began_ns = time.monotonic_ns()
        socket = connect()
        told(time.monotonic_ns() - began_ns)
        return socket

    pool._create_socket = timed
