"""From a well-formed request to a `Plan`: tokenize, and check what depends on the model."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams
from model.tokenizer import IncrementalDecoder, Tokenizer
from service.api.context import ApiContext
from service.api.errors import CONTEXT_EXCEEDED, ProblemError, invalid_field
from service.api.explain_checks import requested_heads
from service.api.generation import Plan
from service.api.limits import ApiLimits
from service.api.schemas import MAX_SEED, GenerateRequest
from service.api.structured_output import check_grammar, requested_grammar
from service.api.text import StopStrings
from service.client import EngineUnavailableError, NeverFitsError, QueueFullError
from service.engine.messages import ModelInfo
from service.metric_recording import Metrics


async def make_plan(
    body: GenerateRequest,
    context: ApiContext,
    request_id: str,
    arrived_s: float,
    *,
    owner: str | None = None,
) -> Plan:
    """Everything that is known before the engine is asked. `owner` may resume and cancel it.

    Raises `ProblemError` (422) naming field, value and limit, and `EngineUnavailableError`
    while the model is being loaded.
    """
    tokenizer, info = context.loaded()
    timeout_s = _timeout(body, context.limits)
    if body.detach_s > 0 and not body.stream:
        raise invalid_field(
            "detach_s", f"{body.detach_s:g} with stream false: only a stream can be resumed"
        )
    _check_vocabulary(body, info.vocab_size)
    grammar = requested_grammar(body)
    prompt_ids = await _prompt_ids(body, tokenizer, info, context.limits)
    max_tokens = _max_tokens(body, len(prompt_ids), info)
    explain = requested_heads(body, max_tokens, info, context.limits)
    if grammar is not None:  # last: it is the dearest
        await check_grammar(grammar, context.grammars, info, timeout_s)
    seed = secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed
    prefix = ""
    if body.echo:
        prefix = body.prompt if isinstance(body.prompt, str) else _echo(prompt_ids, tokenizer)
    return Plan(
        request_id=request_id,
        prompt_token_ids=prompt_ids,
        prefix=prefix,
        seed=seed,
        samplings=[
            _sampling(body, max_tokens, (seed + index) % (MAX_SEED + 1), grammar)
            for index in range(body.n)
        ],
        stops=StopStrings(body.stops),
        priority=body.priority,
        arrived_s=arrived_s,
        timeout_s=timeout_s,
        owner=owner,
        explain=explain,
    )


async def tokenize(
    text: str, tokenizer: Tokenizer, limits: ApiLimits, *, add_special_tokens: bool = True
) -> list[int]:
    """Token ids; a long text is tokenized in a thread, so that the streams go on meanwhile."""
    if len(text) <= limits.tokenize_in_thread_chars:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


def check_token_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raise `ProblemError` for the first id that is outside of the vocabulary."""
    for place, token_id in enumerate(ids):
        if token_id >= vocab_size:
            raise invalid_field(
                field,
                f"token id {token_id} at position {place} is outside of the vocabulary of "
                f"{vocab_size} tokens",
            )


@contextmanager
def rejections_counted(metrics: Metrics, route: str) -> Iterator[None]:
    """Count what is refused before it is admitted, by route and why."""
    try:
        yield
    except ProblemError as error:
        metrics.rejected(route, error.kind)
        raise
    except QueueFullError:
        metrics.rejected(route, "queue-full")
        raise
    except EngineUnavailableError:
        metrics.rejected(route, "unavailable")
        raise
    except NeverFitsError:
        metrics.rejected(route, "never-fits")
        raise


def _echo(prompt_ids: list[int], tokenizer: Tokenizer) -> str:
    # Not `decode`: a character that the prompt's last ids only begin is the continuation's.
    return IncrementalDecoder(tokenizer).push(prompt_ids)


def _timeout(body: GenerateRequest, limits: ApiLimits) -> float:
    if not body.has("timeout_s"):
        return limits.request_timeout_s
    if body.timeout_s > limits.request_timeout_s:
        raise invalid_field(
            "timeout_s",
            f"{body.timeout_s:g} s is over this server's limit of {limits.request_timeout_s:g} s",
        )
    return body.timeout_s


def _check_vocabulary(body: GenerateRequest, vocab_size: int) -> None:
    if body.top_k > vocab_size:
        raise invalid_field(
            "top_k", f"{body.top_k} is more than the vocabulary's {vocab_size} tokens"
        )
    check_token_ids("logit_bias", (int(key) for key in body.logit_bias), vocab_size)
    check_token_ids("stop_token_ids", body.stop_token_ids, vocab_size)


async def _prompt_ids(
    body: GenerateRequest, tokenizer: Tokenizer, info: ModelInfo, limits: ApiLimits
) -> list[int]:
    if isinstance(body.prompt, list):
        if len(body.prompt) < info.context_length:  # or it is refused for its length
            check_token_ids("prompt", body.prompt, info.vocab_size)
        return body.prompt
    return await text_ids(body.prompt, tokenizer, info, limits)


async def text_ids(
    text: str,
    tokenizer: Tokenizer,
    info: ModelInfo,
    limits: ApiLimits,
    *,
    add_special_tokens: bool = True,
) -> list[int]:
    """Token ids of a prompt's text. Raises `ProblemError` (422): it has none, or far too many."""
    # A text that is far too long is not worth the time to find out by how much.
    at_least = tokenizer.fewest_tokens(text)
    if at_least >= info.context_length:
        raise invalid_field(
            "prompt",
            f"{len(text)} characters are at least {at_least} tokens, and the context "
            f"length is {info.context_length}",
            code=CONTEXT_EXCEEDED,
        )
    ids = await tokenize(text, tokenizer, limits, add_special_tokens=add_special_tokens)
    if not ids:
        raise invalid_field("prompt", "the text has no tokens")
    return ids


def _max_tokens(body: GenerateRequest, num_prompt_tokens: int, info: ModelInfo) -> int:
    """How many tokens to generate at most: as asked for, or the default that still fits."""
    context_length = info.context_length
    room = context_length - num_prompt_tokens
    if room < 1:
        raise invalid_field(
            "prompt",
            f"{num_prompt_tokens} tokens leave no room to generate in the context length of "
            f"{context_length}",
            code=CONTEXT_EXCEEDED,
        )
    if body.has("max_tokens") and body.max_tokens > room:
        raise invalid_field(
            "max_tokens",
            f"{num_prompt_tokens} prompt tokens and {body.max_tokens} to generate exceed the "
            f"context length of {context_length}",
            code=CONTEXT_EXCEEDED,
        )
    max_tokens = body.max_tokens
    if not body.has("max_tokens"):
        capacity = info.num_blocks * info.block_size - num_prompt_tokens
        max_tokens = max(1, min(max_tokens, room, capacity))
    if body.min_tokens > max_tokens:
        raise invalid_field(
            "min_tokens", f"{body.min_tokens} is more than max_tokens, which is {max_tokens}"
        )
    return max_tokens


def _sampling(
    body: GenerateRequest, max_tokens: int, seed: int, grammar: GrammarSpec | None
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias={int(key): bias for key, bias in body.logit_bias.items()},
        seed=seed,
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids)),
        ignore_eos=body.ignore_eos,
        grammar=grammar,
        logprobs=body.logprobs,
    )
