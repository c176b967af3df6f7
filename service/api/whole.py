"""Wait for all of a request's continuations, for an answer that is not streamed."""

from __future__ import annotations

from dataclasses import dataclass

from service.api.continuation import Delta, Done
from service.api.generation import Generation
from service.engine.explain_messages import Sight
from service.engine.messages import TokenLogprob


@dataclass(frozen=True, slots=True)
class Whole:
    """A continuation from its first token to its end."""

    done: Done
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None  # parallel to token_ids; None: not asked for
    explained: list[Sight] | None  # likewise


async def whole_continuations(generation: Generation) -> list[Whole]:
    """All continuations, in the order of their index. Raises `ProblemError` when one failed."""
    planned = [(plan, sampling) for plan in generation.plans for sampling in plan.samplings]
    token_ids: list[list[int]] = [[] for _ in planned]
    logprobs: list[list[TokenLogprob] | None] = [
        None if sampling.logprobs is None else [] for _, sampling in planned
    ]
    explained: list[list[Sight] | None] = [
        None if plan.explain is None else [] for plan, _ in planned
    ]
    done: dict[int, Done] = {}
    while items := await generation.next():
        for item in items:
            if isinstance(item, Delta):
                token_ids[item.index] += item.token_ids
                if (known := logprobs[item.index]) is not None:
                    known += item.logprobs or []
                if (seen := explained[item.index]) is not None:
                    seen += item.explained or []
            elif isinstance(item, Done):
                done[item.index] = item
            else:
                raise item.error
    return [
        Whole(one, token_ids[index], logprobs[index], explained[index])
        for index, one in sorted(done.items())
    ]
