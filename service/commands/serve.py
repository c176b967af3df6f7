"""`vitrine serve`: the API process, and the engine process under it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from service import logs
from service.client import EngineClient
from service.commands import CommandError
from service.commands.early_signals import EarlySignals
from service.settings import Settings, engine_config, given_roofline, read_settings


def run(arguments: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C. Raises `CommandError` when the engine cannot start."""
    settings = read_settings(Settings, arguments)
    engine_config(settings, Path())  # settings that disagree are refused before anything starts
    given_roofline(settings.roofline)
    logs.tell_children(settings.log_level, settings.log_format)
    client = make_client(settings)
    early = EarlySignals()
    # First of all: torch takes seconds to import, and does so while this process goes on.
    client.spawn()
    logs.configure(settings.log_level, settings.log_format)
    try:
        asyncio.run(_serve(settings, client, early))
    except SystemExit:  # uvicorn's way to say that it could not listen; its log has the reason
        raise CommandError(f"cannot listen on {settings.host} port {settings.port}") from None
    if client.failure:
        raise CommandError(client.failure)
    return 0


def make_client(settings: Settings) -> EngineClient:
    """The API's side of an engine, as the settings have it. Starts nothing yet."""
    return EngineClient(
        max_in_flight=settings.max_num_seqs + settings.max_queue_requests,
        max_queue_tokens=settings.max_queue_tokens,
        stall_s=settings.stall_s,
        standby=settings.standby,
        max_explanations=settings.max_explain_queue,
    )


async def _serve(settings: Settings, client: EngineClient, early: EarlySignals) -> None:
    from service.commands.connections import raise_file_limit
    from service.commands.http_server import end_in_order, make_server, watch_connections
    from service.commands.loading import LoadedModel
    from service.grammars import are_installed
    from service.grammars.checker import GrammarChecker

    raise_file_limit()
    model = LoadedModel(settings, client)
    grammars = GrammarChecker(model.get_directory) if are_installed() else None
    server = make_server(settings, client, model, grammars)
    early.forward = server.handle_exit
    if early.received:
        server.stop_asked.set()
    tasks = [
        asyncio.create_task(model.load(), name="load-model"),
        asyncio.create_task(watch_connections(server), name="watch-connections"),
        asyncio.create_task(end_in_order(server, client, settings.drain_s), name="end-server"),
    ]
    try:
        await server.serve()
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await model.close()
        if grammars is not None:
            await grammars.close()
        await client.stop()
