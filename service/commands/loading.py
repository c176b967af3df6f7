"""Finding the model and its tokenizer while the server already answers /health/live."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from model.hub import HubError, resolve_model
from model.tokenizer import Tokenizer, TokenizerError
from service.client import EngineClient
from service.settings import Settings, engine_config

log = logging.getLogger("vitrine")


@dataclass(slots=True)
class LoadedModel:
    """The tokenizer, once it is there. A hub model may take minutes to come."""

    settings: Settings
    client: EngineClient
    tokenizer: Tokenizer | None = None

    def get_tokenizer(self) -> Tokenizer | None:
        """None while loading."""
        return self.tokenizer

    async def load(self) -> None:
        """Resolve the model, start the engine with it, read the tokenizer. What is wrong
        with the model is reported through `EngineClient.fail`."""
        try:
            directory = await asyncio.to_thread(
                resolve_model, self.settings.model, self.settings.revision
            )
            self.client.start(engine_config(self.settings, directory))
            self.tokenizer = await asyncio.to_thread(Tokenizer.from_directory, directory)
        except (HubError, TokenizerError) as error:
            self.client.fail(str(error))
