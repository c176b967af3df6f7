"""What heads do, measured: how much of a head's attention goes where a hypothesis says.

A probe is a text and, for some of its queries, the keys that count. A head's score is the
attention on those keys, mean over the queries; chance is what a head would score that looks at
every key it sees alike. The hypotheses and where they come from:

previous    the token before                     Clark et al. 2019, arXiv:1906.04341
first       the first token of the text          Xiao et al. 2023, arXiv:2309.17453 (sinks)
same        earlier places of the same token
induction   in a random sequence and its repetition, the token after the earlier place of this
            one                                  Olsson et al. 2022, arXiv:2209.11895
pronoun     from a pronoun, the noun that it can mean, and the one that it cannot

A noun sentence comes in fours: both orders of its nouns, with the pronoun of either. So a head
that does not heed the pronoun has as much on right nouns as on wrong ones, wherever it looks and
whatever nouns it likes: the chance of right - wrong is 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.attention import causal_mask
from model.config import ModelConfig
from model.explain.record import complete, record
from model.transformer import Transformer

PREVIOUS, FIRST, SAME, INDUCTION = "previous", "first", "same", "induction"
RIGHT, WRONG = "pronoun, right noun", "pronoun, wrong noun"
SCORES = (PREVIOUS, FIRST, SAME, INDUCTION, RIGHT, WRONG)

NOUNS = {
    "he": ("boy", "man", "king"),
    "she": ("girl", "woman", "queen"),
    "it": ("ball", "cake", "box"),
}
FRAMES = (
    "One day, the {first} saw the {second} because {pronoun}",
    "The {first} and the {second} were in the park. Then {pronoun}",
    "The {first} was with the {second}, and {pronoun}",
    "There was a {first}. There was a {second} too. Today {pronoun}",
    "The {first} was near the {second}. Soon {pronoun}",
)

Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A text, and for every score the keys that count for it; a query with none counts not."""

    ids: list[int]
    targets: dict[str, Bool[Tensor, "num_tokens num_tokens"]]  # [query, key]


@dataclass(frozen=True, slots=True, eq=False)
class HeadScores:
    """Of one score: every head's, and what looking at all keys alike would give."""

    heads: Float[Tensor, "num_layers num_heads"]
    chance: float
    num_queries: int


def text_probe(ids: list[int]) -> Probe:
    """A natural text: the token before, the first one, the same one."""
    tokens, position = torch.tensor(ids), torch.arange(len(ids))
    earlier = position[:, None] > position
    return Probe(
        ids,
        {
            PREVIOUS: position[:, None] == position + 1,
            FIRST: earlier & (position == 0),
            SAME: earlier & (tokens[:, None] == tokens),
        },
    )


def induction_probe(start: list[int], vocabulary: Sequence[int], length: int, seed: int) -> Probe:
    """`length` different random tokens, twice, after `start`."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(vocabulary), generator=generator)[:length].tolist()
    once = [vocabulary[i] for i in chosen]
    ids = [*start, *once, *once]
    position = torch.arange(len(ids))
    again = position[:, None] >= len(start) + length
    return Probe(ids, {INDUCTION: again & (position == position[:, None] - length + 1)})


def pronoun_probes(encode: Encode) -> Iterator[list[Probe]]:
    """Sentences in fours, a frame and a pair of nouns each. `encode` gives a text's token ids
    and each token's (start, end) in it."""
    for frame in FRAMES:
        for one, other in itertools.combinations(NOUNS, 2):
            for nouns in itertools.product(NOUNS[one], NOUNS[other]):
                yield [
                    _sentence(encode, frame, order, pronoun, right)
                    for order in (nouns, nouns[::-1])
                    for pronoun, right in zip((one, other), nouns, strict=True)
                ]


def _sentence(
    encode: Encode, frame: str, nouns: tuple[str, ...], pronoun: str, right: str
) -> Probe:
    first, second = nouns
    text = frame.format(first=first, second=second, pronoun=pronoun)
    ids, offsets = encode(text)
    wrong = second if right == first else first
    targets = {}
    for score, noun in ((RIGHT, right), (WRONG, wrong)):
        begin = text.index(f" {noun}") + 1
        keys = torch.tensor([start < begin + len(noun) and end > begin for start, end in offsets])
        targets[score] = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        targets[score][-1] = keys  # the pronoun's last token asks
    return Probe(ids, targets)


class Tally:
    """Scores of many probes, added up."""

    def __init__(self, model: Transformer) -> None:
        self._model, self._config = model, model.config
        heads = (self._config.num_layers, self._config.num_heads)
        self._sums = {score: torch.zeros(heads) for score in SCORES}
        self._alike = dict.fromkeys(SCORES, 0.0)
        self._queries = dict.fromkeys(SCORES, 0)

    def add(self, probe: Probe) -> dict[str, Float[Tensor, "num_layers num_heads"]]:
        """Record a probe. Returns each score's attention, summed over the probe's queries."""
        recording = complete(record(self._model, torch.tensor(probe.ids), every_logit=False))
        alike = _alike(self._config, len(probe.ids))
        found = {}
        for score, target in probe.targets.items():
            found[score] = (recording.attention.cpu() * target).sum(dim=(2, 3))
            self._sums[score] += found[score]
            self._alike[score] += float((alike * target).sum() / self._config.num_layers)
            self._queries[score] += int(target.any(dim=1).sum())
        return found

    def scores(self) -> dict[str, HeadScores]:
        """Means over all queries so far, of the scores that had any."""
        return {
            score: HeadScores(self._sums[score] / queries, self._alike[score] / queries, queries)
            for score, queries in self._queries.items()
            if queries
        }


def _alike(config: ModelConfig, num_tokens: int) -> Float[Tensor, "num_layers queries keys"]:
    """Attention that is the same on all keys a query sees."""
    visible = torch.stack(
        [
            causal_mask(num_tokens, num_tokens, config.window(layer))
            for layer in range(config.num_layers)
        ]
    ).float()
    return visible / visible.sum(dim=-1, keepdim=True)
