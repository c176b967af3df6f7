"""What users ask for. Plain Python, and a function of the random source alone.

fixed: every prompt and answer of the same length. mixed: log-normal lengths, many short and a few
long, as people's are. shared: all prompts begin with the same system prompt. chat: every turn
brings the whole conversation again and a little more.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["fixed", "mixed", "shared", "chat"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPREAD = 0.8  # standard deviation of log length: a tenth is 2.8 times the median or more
# Short and common, so that any tokenizer knows them.
WORDS = (
    "the a cat dog sun sea tree bird house road stone river night day song story king child old "
    "blue small great went saw made found lost gave took and but so then where when"
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt and an answer: the median ones where they are mixed. `shared` is the
    length of the shared system prompt."""

    prompt: int
    output: int
    shared: int = 0
    turns: int = 4


@dataclass(frozen=True, slots=True)
class Wish:
    """One request: a prompt in ids, or for chats in words."""

    prompt: tuple[int, ...]
    max_tokens: int


def wishes(
    kind: Kind, lengths: Lengths, vocab_size: int, context: int, rng: random.Random, seed: int
) -> Iterator[Wish]:
    """Requests without end for /generate; prompts are random ids, so that nothing of them is in the
    prefix cache but what the workload shares. `seed` alone determines the shared system prompt."""
    if kind == "chat":
        while True:
            yield from _turns(lengths, vocab_size, context, rng)
    system = _ids(random.Random(seed), lengths.shared, vocab_size) if kind == "shared" else ()
    while True:
        prompt, output = lengths.prompt, lengths.output
        if kind == "mixed":
            prompt, output = _long_tailed(prompt, rng), _long_tailed(output, rng)
        output = max(1, min(output, context - len(system) - 1))
        prompt = max(1, min(prompt, context - len(system) - output))
        yield Wish(system + _ids(rng, prompt, vocab_size), output)


def messages(lengths: Lengths, rng: random.Random) -> str:
    """What a chat's user says in one turn: as many words as `lengths.prompt`."""
    return " ".join(rng.choices(WORDS.split(" "), k=lengths.prompt))


def _turns(lengths: Lengths, vocab_size: int, context: int, rng: random.Random) -> Iterator[Wish]:
    """One conversation as /generate sees it. The answers in it are drawn, not those that came:
    the prefix cache finds the prompts of earlier turns either way."""
    said: tuple[int, ...] = ()
    for _ in range(lengths.turns):
        said += _ids(rng, lengths.prompt, vocab_size)
        if len(said) + lengths.output > context:
            return
        yield Wish(said, lengths.output)
        said += _ids(rng, lengths.output, vocab_size)


def _long_tailed(median: int, rng: random.Random) -> int:
    return max(1, round(median * rng.lognormvariate(0.0, SPREAD)))


def _ids(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(vocab_size) for _ in range(count))
