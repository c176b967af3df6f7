"""uvicorn around the app, and the order in which things end."""

from __future__ import annotations

import asyncio
import logging
from types import FrameType

import uvicorn

from service.api.app import create_app
from service.client import EngineClient
from service.commands.loading import LoadedModel
from service.settings import Settings

log = logging.getLogger("vitrine")

# After the running requests are done or cancelled: time for their last bytes to leave.
LAST_BYTES_S = 5


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or Ctrl-C only `stop_asked` is set: the sockets stay open while
    running requests finish, so that /health/ready and new requests are told 503 rather than
    refused a connection. A second signal ends the server at once."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stop_asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.stop_asked.is_set():
            self.force_exit = self.should_exit = True
        # Signal handlers run between any two instructions; the event belongs to the loop.
        self._loop.call_soon_threadsafe(self.stop_asked.set)


def make_server(settings: Settings, client: EngineClient, model: LoadedModel) -> DrainingServer:
    """The server, listening where the settings say once `serve()` runs."""
    app = create_app(settings, client, model.get_tokenizer)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_BYTES_S,
        timeout_keep_alive=75,
    )
    return DrainingServer(config)


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
