"""When a request could be sent, and how long its connection took to make.

A user keeps its connection from one request to the next, as browsers and OpenAI's clients do; an
open loop keeps as many as it needed at a time. geventhttpclient has no hook for it, so its pool of
connections looks at the clock when it hands one out, which is just before the request's bytes go.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from locust.contrib.fasthttp import FastHttpSession


def time_connections(session: FastHttpSession, told: Callable[[int, int], None]) -> None:
    """From now on `told` hears, in the greenlet that sends a request to the session's host, when
    it has its connection and how long that took to make, in ns; 0: it was there."""
    pool = session.client.clientpool.get_client(session.base_url)._connection_pool
    get, create = pool.get_socket, pool._create_socket
    made: dict[Any, int] = {}

    def creating() -> Any:
        began_ns = time.monotonic_ns()
        socket = create()
        made[socket] = time.monotonic_ns() - began_ns
        return socket

    def getting() -> Any:
        socket = get()
        told(time.monotonic_ns(), made.pop(socket, 0))
        return socket

    pool.get_socket, pool._create_socket = getting, creating
