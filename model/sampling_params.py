"""What a request may ask of the sampler. No torch here: the API process reads it too."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.grammar_spec import GrammarSpec

GREEDY = 0.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next tokens of one sequence are chosen; bounds are api.md's, checked where a
    request enters (service/api/schemas.py).

    The order in which they act: penalties and `logit_bias` on the logits, then what the
    grammar does not allow is left out, then greedy choice if `temperature` is 0, else division
    by it, `top_k`, `top_p`, `min_p`, noise. Log-probabilities are the model's own, before all
    of these.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: GrammarSpec | None = None  # what the whole continuation must fit
    logprobs: int | None = None  # how many alternatives; None: none, and no log-probability

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
