"""Finding the model and what it reads and writes with, while /health/live already answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from model.chat_template import ChatTemplateError, read_chat_template
from model.hub import HubError, resolve_model
from model.tokenizer import Tokenizer, TokenizerError
from service.chat_renderer import ChatRenderer
from service.client import EngineClient
from service.garbage import keep_what_is_there
from service.settings import Settings, engine_config

log = logging.getLogger("vitrine")


@dataclass(slots=True)
class LoadedModel:
    """The tokenizer and what renders chats, once they are there. A hub model may take minutes to
    come."""

    settings: Settings
    client: EngineClient
    tokenizer: Tokenizer | None = None
    chat_renderer: ChatRenderer | None = None
    directory: Path | None = None

    def get_tokenizer(self) -> Tokenizer | None:
        """None while loading."""
        return self.tokenizer

    def get_chat_renderer(self) -> ChatRenderer | None:
        """None while loading, and for a model without a chat template."""
        return self.chat_renderer

    async def close(self) -> None:
        """End what was started here."""
        if self.chat_renderer is not None:
            await self.chat_renderer.close()

    def get_directory(self) -> Path | None:
        """Of the checkpoint; None while it is being looked for."""
        return self.directory

    async def load(self) -> None:
        """Resolve the model, start the engine with it, read the tokenizer and the chat template.
        What is wrong with the model is reported through `EngineClient.fail`."""
        try:
            directory = await _in_daemon_thread(
                lambda: resolve_model(self.settings.model, self.settings.revision)
            )
            self.directory = directory
            self.client.start(
                msgspec.structs.replace(
                    engine_config(self.settings, directory),
                    max_events_s=self.settings.max_events_s,
                    measure_roofline=self.settings.roofline == "idle",
                )
            )
            override = self.settings.chat_template
            template = await asyncio.to_thread(read_chat_template, directory, override)
            tokenizer = await asyncio.to_thread(Tokenizer.from_directory, directory)
            self.chat_renderer = None if template is None else ChatRenderer(template)
            keep_what_is_there()
            self.tokenizer = tokenizer  # last: with it, requests are taken
            await self._check_chat()
        except (HubError, TokenizerError, ChatTemplateError) as error:
            self.client.fail(str(error))
        except Exception as error:  # noqa: BLE001 - or the server would say "loading" for ever
            self.client.fail(f"loading the model failed: {type(error).__name__}: {error}")

    async def _check_chat(self) -> None:
        """Start what renders chats, and say in time that a template is broken. Raises
        `ChatTemplateError` if it is one that was asked for; a model whose own is broken still
        continues prompts, and every chat is told why it cannot be."""
        if self.chat_renderer is None:
            return
        try:
            await self.chat_renderer.check()
        except ChatTemplateError as error:
            if (asked := self.settings.chat_template) is not None:
                raise ChatTemplateError(f"--chat-template {asked}: {error}") from error
            log.warning("the model's chat template is broken: %s", error)


async def _in_daemon_thread(function: Callable[[], Path]) -> Path:
    """`asyncio.to_thread`, but the process does not wait for the thread when it ends: Ctrl-C
    must not wait for a download."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Path] = loop.create_future()

    def settle(result: Path | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except Exception as raised:  # noqa: BLE001 - raised again where it is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="resolve-model", daemon=True).start()
    return await future
