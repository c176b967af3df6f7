"""From a request's `regex`, `grammar` or `response_format` to a grammar that will compile."""

from __future__ import annotations

import asyncio
from typing import Protocol

from model.grammar_spec import GrammarSpec
from service.api.errors import invalid_field
from service.api.schemas import GenerateRequest
from service.client import QueueFullError
from service.engine.messages import ModelInfo
from service.grammars import MISSING, GrammarError
from service.grammars.checker import CheckerBusyError

RETRY_AFTER_BUSY_S = 2.0


class Checker(Protocol):
    """Tries grammars out; `service.grammars.checker.GrammarChecker` is the real one."""

    async def check(self, spec: GrammarSpec, info: ModelInfo) -> None:
        """Raises `GrammarError` or `CheckerBusyError`."""
        ...


def requested_grammar(body: GenerateRequest) -> GrammarSpec | None:
    """What the text must fit. Raises `ProblemError` (422) for fields that exclude each other."""
    sent = [
        name for name in ("regex", "grammar", "response_format") if getattr(body, name) is not None
    ]
    if len(sent) > 1:
        raise invalid_field(
            sent[1], f"at most one of regex, grammar and response_format; {sent[0]} is there too"
        )
    spec: GrammarSpec | None = None
    if body.regex is not None:
        spec = GrammarSpec("regex", body.regex)
    elif body.grammar is not None:
        spec = GrammarSpec("lark", body.grammar)
    elif body.response_format is not None:
        spec = body.response_format.grammar()
    if spec is None:
        return None
    # A text that fits a grammar ends where the grammar says.
    if body.min_tokens > 0:
        raise invalid_field(
            "min_tokens", f"{body.min_tokens} is not possible with {sent[0]}, which decides the end"
        )
    if body.ignore_eos:
        raise invalid_field(
            "ignore_eos", f"true is not possible with {sent[0]}, which decides the end"
        )
    return spec


async def check_grammar(
    spec: GrammarSpec, checker: Checker | None, info: ModelInfo, timeout_s: float
) -> None:
    """Raises `ProblemError` (422) for a grammar that cannot be used, naming its field, and
    `QueueFullError` when its turn to be tried does not come within `timeout_s`."""
    if checker is None:
        raise invalid_field(spec.field, f"not supported: {MISSING}")
    try:
        async with asyncio.timeout(timeout_s):
            await checker.check(spec, info)
    except GrammarError as error:
        raise invalid_field(spec.field, str(error)) from None
    except CheckerBusyError as error:
        raise QueueFullError(str(error), RETRY_AFTER_BUSY_S) from None
    except TimeoutError:
        raise QueueFullError(
            f"the grammar was not checked within timeout_s, {timeout_s:g} s", RETRY_AFTER_BUSY_S
        ) from None
