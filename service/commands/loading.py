"""Finding the model and its tokenizer while the server already answers /health/live."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.hub import HubError, resolve_model
from model.tokenizer import Tokenizer, TokenizerError
from service.client import EngineClient
from service.settings import Settings, engine_config


@dataclass(slots=True)
class LoadedModel:
    """The tokenizer, once it is there. A hub model may take minutes to come."""

    settings: Settings
    client: EngineClient
    tokenizer: Tokenizer | None = None
    directory: Path | None = None

    def get_tokenizer(self) -> Tokenizer | None:
        """None while loading."""
        return self.tokenizer

    def get_directory(self) -> Path | None:
        """Of the checkpoint; None while it is being looked for."""
        return self.directory

    async def load(self) -> None:
        """Resolve the model, start the engine with it, read the tokenizer. What is wrong
        with the model is reported through `EngineClient.fail`."""
        try:
            directory = await _in_daemon_thread(
                lambda: resolve_model(self.settings.model, self.settings.revision)
            )
            self.directory = directory
            self.client.start(engine_config(self.settings, directory))
            self.tokenizer = await asyncio.to_thread(Tokenizer.from_directory, directory)
        except (HubError, TokenizerError) as error:
            self.client.fail(str(error))
        except Exception as error:  # noqa: BLE001 - or the server would say "loading" for ever
            self.client.fail(f"loading the model failed: {type(error).__name__}: {error}")


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
