"""How many prompt tokens a step may take beside running streams.

A chunk of a prompt makes a step longer, and every running stream waits for the step. The
bound is a ratio, not a number of tokens: machines and models differ a thousandfold in what a
token costs, and both costs are seen here in every step anyway. Chunks change no token
(README, "The same tokens in any company"), so the measured times may decide.
"""

from __future__ import annotations

from collections import deque
from statistics import median

NUM_REMEMBERED = 8
# Less would cost more in steps than it saves in waiting.
FEWEST_TOKENS = 16
# A token in a step of a thousand costs about half of one in a step of fifty.
ALONE = 2


class PromptPace:
    """Bounds the prompt tokens of a step so that it takes about `max_step_ratio` times a step of
    decodes alone; 0 does not bound them."""

    def __init__(self, max_step_ratio: float) -> None:
        self._max_step_ratio = max_step_ratio
        self._decode_s: deque[float] = deque(maxlen=NUM_REMEMBERED)  # steps of decodes alone
        self._token_s: deque[float] = deque(maxlen=NUM_REMEMBERED)  # what a prompt token adds

    def stepped(self, step_s: float, num_decodes: int, num_prompt_tokens: int) -> None:
        """Book a step's time and what was in it."""
        if num_prompt_tokens == 0:
            if num_decodes:
                self._decode_s.append(step_s)
            return
        if num_prompt_tokens < FEWEST_TOKENS:
            return  # too few to tell what one costs
        if num_decodes and self._decode_s:
            self._token_s.append(max(0.0, step_s - median(self._decode_s)) / num_prompt_tokens)
        else:
            self._token_s.append(ALONE * step_s / num_prompt_tokens)

    @property
    def prompt_tokens(self) -> int | None:
        """How many a step with decodes may take; None: no bound, or nothing is known yet."""
        if not self._max_step_ratio or not self._decode_s or not self._token_s:
            return None
        token_s = max(self._token_s)  # a late chunk of a long prompt costs more than an early one
        if token_s <= 0:
            return None
        wanted = (self._max_step_ratio - 1) * median(self._decode_s) / token_s
        return max(FEWEST_TOKENS, int(wanted))
