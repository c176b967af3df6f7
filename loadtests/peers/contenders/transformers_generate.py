"""transformers `generate`: dynamic cache, scaled-dot-product attention, one static batch."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from loadtests.peers.work import Measurement, Work, from_stamps, require_tokens, serve_work, warmed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class StepClock(StoppingCriteria):
    """Never stops anything; notes when each step's tokens were there."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: object
    ) -> torch.BoolTensor:
        self.stamps.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)  # type: ignore[return-value]


@torch.inference_mode()
def measure(work: Work) -> Iterator[Measurement]:
    """Every batch through one model."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(work.threads)
    model = AutoModelForCausalLM.from_pretrained(
        work.checkpoint, dtype=DTYPES[work.dtype], attn_implementation="sdpa"
    ).eval()

    def run(prompts: list[list[int]], output_tokens: int) -> Measurement:
        input_ids = torch.tensor(prompts)
        clock = StepClock()
        began = time.perf_counter()
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            disable_compile=True,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        require_tokens([output.shape[1] - input_ids.shape[1]], output_tokens)
        first_ids = output[0, input_ids.shape[1] :].tolist()
        stamps = [clock.stamps] * len(prompts)
        return from_stamps(work, began, stamps, output_tokens, first_ids=first_ids)

    yield from warmed(work, run)


if __name__ == "__main__":
    serve_work(measure)
