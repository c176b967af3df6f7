"""uvicorn around the app, and the order in which things end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.api.app import create_app
from service.api.limits import ApiLimits
from service.api.visit import log_line
from service.client import EngineClient
from service.commands.connections import (
    CHECK_S,
    Connection,
    SlowReaders,
    bound_send_buffers,
    cut,
)
from service.commands.door import api_limits, check_tls, warn_if_open
from service.commands.loading import LoadedModel
from service.grammars.checker import GrammarChecker
from service.http_protocol import BoundedProtocol, ConnectionLimits, bounded
from service.metric_aliases import AliasError, parse_aliases
from service.metric_recording import Metrics
from service.metrics import Http, Requests
from service.settings import Settings, SettingsError, given_roofline
from service.tracing import TracingError, start_tracing

log = logging.getLogger("vitrine")

# After the running requests are done or cancelled: time for their last bytes to leave. A client
# that takes none of them is hung up on sooner.
LAST_BYTES_S = 5.0
LAST_SLOW_READER_S = 1.0
BACKLOG = 4096  # connections that wait to be accepted; the kernel may have a lower limit
BUNDLED_MODEL_NAME = "stories"


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or Ctrl-C only `stop_asked` is set: the sockets stay open while
    running requests finish, so that /health/ready and new requests are told 503 rather than
    refused a connection. A second signal cuts the time they have short: what still runs ends
    as cancelled, and then the server."""

    def __init__(
        self,
        config: uvicorn.Config,
        client: EngineClient,
        slow_reader_s: float,
        on_slow_reader: Callable[[], None],
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """`on_end` is called when the last answer is out, off the event loop."""
        super().__init__(config)
        self.slow_reader_s = slow_reader_s
        self.slow_readers = SlowReaders(on_slow_reader)
        self.on_end = on_end
        self.stop_asked = asyncio.Event()
        self._client = client
        self._loop = asyncio.get_running_loop()

    @property
    def connections(self) -> list[Connection]:
        """Those that are open."""
        return list(self.server_state.connections)  # type: ignore[arg-type]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        bound_send_buffers(one for server in self.servers for one in server.sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Signal handlers run between any two instructions; the events belong to the loop.
        self._loop.call_soon_threadsafe(self._asked_to_stop)

    def _asked_to_stop(self) -> None:
        if self.stop_asked.is_set():
            self._client.end_grace()
        self.stop_asked.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn would cancel the tasks of clients that do not read, each with a traceback in
        # the log. To the app a connection that is cut is a client that went away: at once if it
        # takes nothing, and at last if it takes too little.
        self.slow_reader_s = min(self.slow_reader_s, LAST_SLOW_READER_S)
        hang_up = self._loop.call_later(LAST_BYTES_S, self._hang_up)
        if issubclass(protocol := self.config.http_protocol_class, BoundedProtocol):
            protocol.is_ending = True
        try:
            await super().shutdown(sockets)
        finally:
            hang_up.cancel()
        if self.on_end is not None:
            await asyncio.to_thread(self.on_end)

    def _hang_up(self) -> None:
        for connection in self.connections:
            log.info("hanging up on a client that does not read")
            cut(connection)


def make_app(
    settings: Settings,
    limits: ApiLimits,
    client: EngineClient,
    model: LoadedModel,
    grammars: GrammarChecker | None,
) -> tuple[FastAPI, Callable[[], None] | None]:
    """The app around these parts, and what to call off the event loop when it has ended. Raises
    `SettingsError`."""
    name = served_name(settings)
    try:
        tracing = start_tracing(settings.otlp_endpoint, name)
    except TracingError as error:
        raise SettingsError(f"--otlp-endpoint: {error}") from None
    try:
        aliases = parse_aliases(settings.metric_aliases)
    except AliasError as error:
        raise SettingsError(f"--metric-aliases: {error}") from None
    client.record.roofline = given_roofline(settings.roofline)
    told = [log_line] if tracing is None else [log_line, tracing.on_complete]
    app = create_app(
        limits,
        client,
        model.get_tokenizer,
        name,
        chat_renderer=model.get_chat_renderer,
        grammars=grammars,
        metric_aliases=aliases,
        on_complete=told,
    )
    return app, None if tracing is None else tracing.shutdown


def make_server(
    settings: Settings,
    client: EngineClient,
    model: LoadedModel,
    grammars: GrammarChecker | None,
) -> DrainingServer:
    """The server, listening where the settings say once `serve()` runs. Raises `SettingsError`."""
    check_tls(settings)
    limits = api_limits(settings)
    warn_if_open(settings.host, has_keys=bool(limits.api_keys), has_tls=bool(settings.tls_cert))
    app, on_end = make_app(settings, limits, client, model, grammars)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=bounded(ConnectionLimits(max_connections=settings.max_connections)),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=int(2 * LAST_BYTES_S),
        lifespan="off",  # what starts and ends with the server does so in serve.py
        # Nothing here depends on what a proxy says of the client, and anyone could say it.
        proxy_headers=False,
        timeout_keep_alive=75,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        ssl_ca_certs=settings.tls_client_ca,
        ssl_cert_reqs=ssl.CERT_NONE if settings.tls_client_ca is None else ssl.CERT_REQUIRED,
    )
    try:
        config.load()  # reads the certificates
    except OSError as error:  # ssl's errors are of this kind
        raise SettingsError(f"--tls-cert, --tls-key or --tls-client-ca: {error}") from None
    metrics: Metrics = app.state.context.metrics
    server = DrainingServer(config, client, settings.slow_reader_s, metrics.slow_reader, on_end)
    loop = asyncio.get_running_loop()
    metrics.watch(Requests.JOURNAL_ENTRIES, lambda: client.in_flight)
    metrics.watch(Http.CONNECTIONS, lambda: len(server.connections))
    metrics.watch(Http.TASKS, lambda: len(asyncio.all_tasks(loop)))
    return server


def served_name(settings: Settings) -> str:
    """What clients call the model: as the settings say, or the last part of a directory's path
    (the rest is nobody's business), or the hub id."""
    if settings.served_model_name:
        return settings.served_model_name
    if settings.model is None:
        return BUNDLED_MODEL_NAME
    # Not Path.is_dir: it raises where the name is longer than the system's limit.
    is_directory = os.path.isdir(settings.model)  # noqa: PTH112
    return Path(settings.model).resolve().name if is_directory else settings.model


async def watch_connections(server: DrainingServer) -> None:
    """Close those whose clients take nothing, until cancelled."""
    clock = asyncio.get_running_loop().time
    while True:
        server.slow_readers.check(server.connections, clock(), server.slow_reader_s)
        await asyncio.sleep(CHECK_S)


async def end_in_order(server: DrainingServer, client: EngineClient, drain_s: float) -> None:
    """Wait for a signal or an engine that cannot start; let running requests end; stop."""
    waits = [
        asyncio.create_task(server.stop_asked.wait()),
        asyncio.create_task(client.failed.wait()),
    ]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    if server.stop_asked.is_set():
        log.info("stopping; %d requests have %g s to finish", client.in_flight, drain_s)
        await client.drain(drain_s)
    server.should_exit = True
