"""How many prompt tokens a step may take beside running streams.

A chunk of a prompt makes a step longer, and every running stream waits for the step. So there is
a bound, for the sake of streams that were there before (`Scheduler.phases`). It is a ratio, not a
number of tokens: machines and models differ a thousandfold in what a token costs, and both costs
are seen here in every step anyway. Chunks change no token (README, "The same tokens in any
company"), so the measured times may decide.
"""

from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np

from service.engine.scheduler import Phases

NUM_REMEMBERED = 8
# Less would cost more in steps than it saves in waiting.
FEWEST_TOKENS = 16
# What a token alone had cost is multiplied by before one was seen beside decodes.
ALONE = 2


class PromptPace:
    """Bounds the prompt tokens of a step so that it takes about `max_step_ratio` times a step of
    its decodes alone; 0 does not bound them."""

    def __init__(self, max_step_ratio: float) -> None:
        self._max_step_ratio = max_step_ratio
        # Steps of decodes alone, (decodes, seconds), for each power of two of decodes: while
        # prompts come without a pause there are none of today's number.
        self._decode_s: dict[int, deque[tuple[int, float]]] = {}
        self._token_s: deque[float] = deque(maxlen=NUM_REMEMBERED)  # what a prompt token adds

    def stepped(self, step_s: float, num_decodes: int, num_prompt_tokens: int) -> None:
        """Book a step's time and what was in it."""
        if num_prompt_tokens == 0:
            if num_decodes:
                seen = self._decode_s.setdefault(
                    num_decodes.bit_length(), deque(maxlen=NUM_REMEMBERED)
                )
                seen.append((num_decodes, step_s))
            return
        if num_prompt_tokens < FEWEST_TOKENS:
            return  # too few to tell what one costs
        if num_decodes and self._decode_s:
            added_s = max(0.0, step_s - self._decodes_alone_s(num_decodes))
            self._token_s.append(added_s / num_prompt_tokens)
        else:
            self._token_s.append(ALONE * step_s / num_prompt_tokens)

    def prompt_tokens(self, phases: Phases) -> int | None:
        """How many a step with decodes may take; None: no bound, or nothing is known yet.

        Where none of those that write is settled there is no bound: they came with those that
        wait, and all of a burst is done sooner when it begins together. Where more wait to begin
        than half of those that write, the bound grows with their share: after a larger burst
        small chunks would keep many from beginning for the sake of few.
        """
        if not self._max_step_ratio or not self._decode_s or not self._token_s:
            return None
        token_s = max(self._token_s)  # a late chunk of a long prompt costs more than an early one
        if not phases.settled or token_s <= 0:
            return None
        ratio = self._max_step_ratio * max(1.0, 2 * phases.starting / phases.decoding)
        wanted = (ratio - 1) * self._decodes_alone_s(phases.decoding) / token_s
        return max(FEWEST_TOKENS, int(wanted))

    def _decodes_alone_s(self, num_decodes: int) -> float:
        """Seconds of a step of so many decodes, read between the numbers that were seen."""
        seen = [self._decode_s[power] for power in sorted(self._decode_s)]
        numbers = [median(number for number, _ in steps) for steps in seen]
        seconds = [median(step_s for _, step_s in steps) for steps in seen]
        return float(np.interp(num_decodes, numbers, seconds))
