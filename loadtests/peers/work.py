"""The work every contender gets, and what it answers: plain data, standard library only,
because it is read by interpreters that have nothing of ours installed.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

What = Literal["decode", "prefill", "http"]
WARM_UP_TOKENS = 8


class PeerError(Exception):
    """A contender cannot do the work; the message goes beside its column."""


@dataclass(frozen=True, slots=True)
class Work:
    """So many prompts of random ids at once, so many greedy tokens each, end of text ignored."""

    shape: str
    dtype: Literal["fp32", "bf16", "int8"]
    what: What
    batches: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    threads: int
    vocab_size: int
    folder: str  # where `prepare` put things
    checkpoint: str  # Hugging Face format
    seed: int

    def prompts(self, count: int, salt: int = 0) -> list[list[int]]:
        """`count` different prompts. Another salt gives others, so that no prefix cache can
        answer from what the warm-up computed. Ids keep clear of the special ones."""
        rng = random.Random(f"{self.seed}/{salt}/{count}")
        margin = min(300, self.vocab_size // 4)
        return [
            [rng.randrange(margin, self.vocab_size - margin) for _ in range(self.prompt_tokens)]
            for _ in range(count)
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        fields = json.loads(text)
        return cls(**fields | {"batches": tuple(fields["batches"])})


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one contender did with one batch, once. None: it cannot tell."""

    batch: int
    decode_tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    end_to_end_tokens_per_s: float | None
    ttft_p50_ms: float | None = None
    itl_p50_ms: float | None = None
    itl_p99_ms: float | None = None
    first_ids: tuple[int, ...] = ()  # of the first sequence: is it the same work?

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        fields = json.loads(text)
        return cls(**fields | {"first_ids": tuple(fields["first_ids"])})


def from_stamps(
    work: Work,
    began: float,
    stamps: list[list[float]],
    output_tokens: int,
    *,
    all_visible: bool = True,
    first_ids: Iterable[int] = (),
) -> Measurement:
    """The one definition of every rate, from when each token of each sequence came.

    Prefill is over when the last sequence has its first token. Decode tokens/s counts what all
    sequences write together, from that moment until the first of them ends: neither prefill work
    nor a batch that empties, because some began sooner, slows it. end-to-end counts all tokens over
    all the time. Where some tokens come unseen (`all_visible` false: a server that withholds half
    a character), or one ends before the last begins, decode is not told.
    """
    batch = len(stamps)
    if any(not of_one for of_one in stamps):
        raise PeerError("a sequence ended without a token")
    prefilled = max(of_one[0] for of_one in stamps)
    first_end = min(of_one[-1] for of_one in stamps)
    ended = max(of_one[-1] for of_one in stamps)
    together = sum(prefilled < stamp <= first_end for of_one in stamps for stamp in of_one)
    gaps = [1e3 * (b - a) for of_one in stamps for a, b in itertools.pairwise(of_one)]
    return Measurement(
        batch=batch,
        decode_tokens_per_s=(
            together / (first_end - prefilled) if together and all_visible else None
        ),
        prefill_tokens_per_s=batch * work.prompt_tokens / (prefilled - began),
        end_to_end_tokens_per_s=batch * output_tokens / (ended - began),
        ttft_p50_ms=1e3 * statistics.median(of_one[0] - began for of_one in stamps),
        itl_p50_ms=percentile(gaps, 50) if gaps else None,
        itl_p99_ms=percentile(gaps, 99) if gaps else None,
        first_ids=tuple(first_ids)[:16],
    )


def percentile(values: list[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[round(percent / 100 * (len(ordered) - 1))]


def require_tokens(counts: Iterable[int], wanted: int) -> None:
    """Raise `PeerError` unless every sequence has exactly the wanted number of tokens."""
    wrong = sorted({count for count in counts if count != wanted})
    if wrong:
        raise PeerError(f"sequences of {wrong} tokens instead of {wanted}: not the same work")


def warmed(work: Work, run: Callable[[list[list[int]], int], Measurement]) -> Iterator[Measurement]:
    """`run(prompts, output_tokens)` once briefly and once in full for every batch size."""
    for batch in work.batches:
        run(work.prompts(batch, salt=0), min(WARM_UP_TOKENS, work.output_tokens))
        yield run(work.prompts(batch, salt=1), work.output_tokens)


def serve_work(measure: Callable[[Work], Iterable[Measurement]]) -> None:
    """The main function of a contender process: its work as an argument, one line of JSON on
    standard output per measurement, each as soon as it is there."""
    work = Work.from_json(sys.argv[1])
    try:
        for measurement in measure(work):
            print(json.dumps(asdict(measurement)), flush=True)
    except PeerError as error:
        sys.exit(f"PeerError: {error}")
