"""uvicorn around the app, and the order in which things end."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import FrameType

import uvicorn

from service.api.app import create_app
from service.api.limits import ApiLimits, api_key_hash
from service.client import EngineClient
from service.commands.loading import LoadedModel
from service.grammars.checker import GrammarChecker
from service.settings import Settings, SettingsError

log = logging.getLogger("vitrine")

# After the running requests are done or cancelled: time for their last bytes to leave.
LAST_BYTES_S = 5
BUNDLED_MODEL_NAME = "stories"


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


def make_server(
    settings: Settings,
    client: EngineClient,
    model: LoadedModel,
    grammars: GrammarChecker | None,
) -> DrainingServer:
    """The server, listening where the settings say once `serve()` runs."""
    limits = ApiLimits(
        max_body_bytes=settings.max_body_bytes,
        request_timeout_s=settings.request_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        api_key_hashes=read_api_keys(settings.api_key_file),
    )
    name = settings.served_model_name or settings.model or BUNDLED_MODEL_NAME
    app = create_app(
        limits,
        client,
        model.get_tokenizer,
        name.rstrip("/").rsplit("/", 1)[-1],
        grammars=grammars,
    )
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


def read_api_keys(path: Path | None) -> tuple[bytes, ...]:
    """Hashes of the keys in a file of one key a line, `key` or `name:key` (the name ends at
    the first colon); blank lines and lines that begin with # do not count.

    Raises `SettingsError` for a file that cannot be read or that holds no key: a server that
    was told to ask for keys must not run without.
    """
    if path is None:
        return ()
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--api-key-file {path}: {error}") from None
    keys = [
        line.partition(":")[2] if ":" in line else line
        for line in lines
        if line and not line.startswith("#")
    ]
    if not keys or not all(keys):
        raise SettingsError(f"--api-key-file {path} holds no key, or an empty one")
    return tuple(api_key_hash(key) for key in keys)


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
