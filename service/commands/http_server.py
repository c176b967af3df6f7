"""uvicorn around the app, and the order in which things end."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from types import FrameType

import uvicorn

from service.api.app import create_app
from service.api.visit import log_line
from service.client import EngineClient
from service.commands.door import api_limits, check_tls, warn_if_open
from service.commands.loading import LoadedModel
from service.http_protocol import ConnectionLimits, bounded
from service.settings import Settings, SettingsError
from service.tracing import TracingError, start_tracing

log = logging.getLogger("vitrine")

# After the running requests are done or cancelled: time for their last bytes to leave.
LAST_BYTES_S = 5
BUNDLED_MODEL_NAME = "stories"


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or Ctrl-C only `stop_asked` is set: the sockets stay open while
    running requests finish, so that /health/ready and new requests are told 503 rather than
    refused a connection. A second signal ends the server at once."""

    def __init__(self, config: uvicorn.Config, on_end: Callable[[], None] | None = None) -> None:
        """`on_end` is called when the last answer is out, off the event loop."""
        super().__init__(config)
        self.on_end = on_end
        self.stop_asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.on_end is not None:
            await asyncio.to_thread(self.on_end)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.stop_asked.is_set():
            self.force_exit = self.should_exit = True
        # Signal handlers run between any two instructions; the event belongs to the loop.
        self._loop.call_soon_threadsafe(self.stop_asked.set)


def make_server(settings: Settings, client: EngineClient, model: LoadedModel) -> DrainingServer:
    """The server, listening where the settings say once `serve()` runs. Raises `SettingsError`."""
    check_tls(settings)
    limits = api_limits(settings)
    warn_if_open(settings.host, has_keys=bool(limits.api_keys), has_tls=bool(settings.tls_cert))
    name = settings.served_model_name or settings.model or BUNDLED_MODEL_NAME
    name = name.rstrip("/").rsplit("/", 1)[-1]
    try:
        tracing = start_tracing(settings.otlp_endpoint, name)
    except TracingError as error:
        raise SettingsError(f"--otlp-endpoint: {error}") from None
    told = [log_line] if tracing is None else [log_line, tracing.on_complete]
    app = create_app(limits, client, model.get_tokenizer, name, on_complete=told)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=bounded(ConnectionLimits(max_connections=settings.max_connections)),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        # Nothing here depends on what a proxy says of the client, and anyone could say it.
        proxy_headers=False,
        timeout_graceful_shutdown=LAST_BYTES_S,
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
    return DrainingServer(config, on_end=None if tracing is None else tracing.shutdown)


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
