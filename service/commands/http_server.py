"""uvicorn around the app, and the order in which things end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from service.api.app import create_app
from service.api.keys import ApiKey, KeyFileError, parse_keys
from service.api.limits import ApiLimits
from service.api.visit import log_line
from service.client import EngineClient
from service.commands.loading import LoadedModel
from service.http_protocol import ConnectionLimits, bounded
from service.settings import Settings, SettingsError
from service.tracing import TracingError, start_tracing

log = logging.getLogger("vitrine")

# After the running requests are done or cancelled: time for their last bytes to leave.
LAST_BYTES_S = 5
BUNDLED_MODEL_NAME = "stories"
_ORIGIN = re.compile(r"https?://[a-z0-9.\-\[\]:]+")


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


def api_limits(settings: Settings) -> ApiLimits:
    """What the routes are told. Raises `SettingsError` for keys or origins that are none, and
    for limits of keys without keys."""
    keys = read_api_keys(settings.api_key_file, settings.api_keys)
    per_key = (settings.max_requests_per_key, settings.max_tokens_per_minute_per_key)
    if not keys and any(limit is not None for limit in per_key):
        raise SettingsError(
            "--max-requests-per-key and --max-tokens-per-minute-per-key need --api-key-file"
        )
    return ApiLimits(
        max_body_bytes=settings.max_body_bytes,
        request_timeout_s=settings.request_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        cors_origins=read_origins(settings.cors_origins),
        max_requests_per_key=settings.max_requests_per_key,
        max_tokens_per_minute_per_key=settings.max_tokens_per_minute_per_key,
        api_keys=keys,
    )


def check_tls(settings: Settings) -> None:
    """Raises `SettingsError` for a key or authorities without a certificate."""
    if settings.tls_cert is None and (settings.tls_key or settings.tls_client_ca):
        raise SettingsError("--tls-key and --tls-client-ca need --tls-cert")


def warn_if_open(host: str, *, has_keys: bool, has_tls: bool) -> None:
    """Say it when other machines can reach a server that lets everyone in, or see its keys."""
    if is_loopback(host):
        return
    if not has_keys:
        log.warning("listening on %s without API keys: whoever reaches it may use it", host)
    elif not has_tls:
        log.warning("listening on %s without TLS: keys and texts can be read on the way", host)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_origins(text: str | None) -> tuple[str, ...]:
    """The origins in a list with commas. Raises `SettingsError` for what is no origin: it would
    match no page, silently."""
    origins = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise SettingsError(
                f"--cors-origins {origin!r}: an origin is https://name or https://name:port, in "
                "lower case and without a path"
            )
    return origins


def read_api_keys(path: Path | None, from_environment: str | None = None) -> tuple[ApiKey, ...]:
    """The keys of a file, one a line, and of VITRINE_API_KEYS, separated by commas (both as
    `service.api.keys.parse_keys` has it).

    Raises `SettingsError` for a file that cannot be read, a line that holds no key, and for no
    key at all: a server that was told to ask for keys must not run without.
    """
    if path is None and from_environment is None:
        return ()
    lines = [] if from_environment is None else from_environment.split(",")
    where = "VITRINE_API_KEYS"
    try:
        keys = parse_keys(lines)
        if path is not None:
            where = f"--api-key-file {path}"
            keys = parse_keys([*path.read_text().splitlines(), *lines])
    except (OSError, UnicodeDecodeError, KeyFileError) as error:
        raise SettingsError(f"{where}: {error}") from None
    if not keys:
        raise SettingsError(f"{where} holds no key")
    return keys


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
