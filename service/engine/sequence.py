"""One request's lengths and state, as the engine sees it.

    token_ids   | prompt ............... | output ......... |
                0                  num_prompt          len(token_ids)
    cache       | computed ........ | scheduled ... |
                0              num_computed

A step computes keys and values for the scheduled tokens. When it reaches the end of
`token_ids`, the last row's logits give the next token. A decoding sequence therefore always
stands at num_computed == len(token_ids) - 1, and preemption is num_computed = 0: prompt and
output are still there and are simply computed again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from model.sampling_params import SamplingParams
from service.engine.blocks import ROOT_HASH, block_hash
from service.grammars import TextMatcher

# Stands in `token_ids` for a token that was drawn and that the host has not read yet: always the
# last one, and only while the next step is prepared during this one (service/engine/core.py).
UNREAD = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation in the engine. Times are seconds of `time.monotonic()`."""

    id: int
    token_ids: list[int]  # prompt, then output; grows
    num_prompt: int
    sampling: SamplingParams
    priority: int = 0
    order: int = 0  # of arrival; kept through preemption
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks, filled lazily
    cached_prompt_tokens: int | None = None  # None until first admitted
    arrived_at: float = 0.0
    started_at: float | None = None
    began_at: float = math.inf  # when its first token was read
    explain: list[tuple[int, int]] | None = None  # see `Submit`
    num_preemptions: int = 0
    seat: int = -1  # where its last token lies on the device; read only while that is UNREAD
    matcher: TextMatcher | None = None  # where the output stands in its grammar

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def is_full(self) -> bool:
        """Its last token was drawn, if perhaps not read: there is nothing left to compute."""
        return self.num_output >= self.sampling.max_tokens

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def max_length(self) -> int:
        """Tokens it can ever hold; the last one generated is never computed."""
        return self.num_prompt + self.sampling.max_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service: priority, then arrival. Lower runs first."""
        return (self.priority, self.order)

    def hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Hashes of the first `num_blocks` full blocks, each computed once in its life."""
        while len(self.block_hashes) < num_blocks:
            start = len(self.block_hashes) * block_size
            parent = self.block_hashes[-1] if self.block_hashes else ROOT_HASH
            self.block_hashes.append(block_hash(parent, self.token_ids[start : start + block_size]))
        return self.block_hashes[:num_blocks]
