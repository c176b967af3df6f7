"""A small tokenizer and the app on a scripted engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx2
import openai
import pytest
import tokenizers
from fastapi import FastAPI
from tokenizers import decoders, models, pre_tokenizers, trainers

from model.tokenizer import Tokenizer
from service.api.app import create_app
from service.api.context import ApiContext
from service.api.limits import ApiLimits
from service.api.structured_output import Checker
from tests.api.asgi_client import Exchange
from tests.api.fake_engine import FakeEngine, Script, stay_silent

CORPUS = ["Once upon a time there was a little glass case, naïve and 東京 \U0001f600."] * 3


@cache
def make_tokenizer() -> Tokenizer:
    """Byte-level BPE; id 0 is the end of text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@dataclass
class House:
    """The app on a scripted engine."""

    engine: FakeEngine
    app: FastAPI
    tokenizer: Tokenizer
    limits: ApiLimits

    @property
    def context(self) -> ApiContext:
        context: ApiContext = self.app.state.context
        return context

    def exchange(self, body: Any = None, **keywords: Any) -> Exchange:
        return Exchange(self.app, body, **keywords)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx2.AsyncClient]:
        transport = httpx2.ASGITransport(app=self.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client

    @asynccontextmanager
    async def openai(self, api_key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
        """OpenAI's own client; a stream comes to it in one piece, when it has ended."""
        transport = httpx2.ASGITransport(app=self.app)
        async with openai.AsyncOpenAI(
            base_url="http://test/v1",
            api_key=api_key,
            max_retries=0,
            http_client=httpx2.AsyncClient(transport=transport),
        ) as client:
            yield client

    def counts(self) -> dict[str, float]:
        """All counters and gauges, by name and labels, and by name alone added up."""
        counts: dict[str, float] = {}
        for family in self.context.metrics.registry.collect():
            for sample in family.samples:
                name = sample.name.removeprefix("vitrine_")
                for value in ["", *[f":{v}" for v in sample.labels.values()]]:
                    counts[name + value] = counts.get(name + value, 0) + sample.value
        return counts

    def check_balance(self) -> None:
        """Law 1: accepted = finished + aborted + failed + in flight."""
        counts = self.counts()
        ended = sum(
            counts.get(f"requests_{outcome}_total", 0)
            for outcome in ("finished", "aborted", "failed")
        )
        assert counts["requests_accepted_total"] == ended + counts["requests_in_flight"]
        assert counts["requests_in_flight"] == len(self.context.generations)


@pytest.fixture
def house(tokenizer: Tokenizer) -> Callable[..., House]:
    """Make an app: `house(script, **limits)`."""

    def make(
        script: Script = stay_silent,
        grammars: Checker | None = None,
        *,
        chat_renderer: Any = None,
        **limits: Any,
    ) -> House:
        engine = FakeEngine(script)
        bounds = ApiLimits(**limits)
        app = create_app(
            bounds,
            engine,
            lambda: tokenizer,
            "case",
            chat_renderer=lambda: chat_renderer,
            grammars=grammars,
        )
        return House(engine, app, tokenizer, bounds)

    return make
