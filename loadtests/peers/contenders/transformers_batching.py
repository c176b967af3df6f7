"""transformers' continuous batching (`generate_batch`): paged cache, requests join and leave.

Every call starts and stops its manager, which weighs on a single request.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from loadtests.peers.contenders.transformers_generate import DTYPES
from loadtests.peers.work import Measurement, Work, from_stamps, require_tokens, serve_work, warmed


def measure(work: Work) -> Iterator[Measurement]:
    """Every batch through one model."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(work.threads)
    model = AutoModelForCausalLM.from_pretrained(
        work.checkpoint, dtype=DTYPES[work.dtype], attn_implementation="sdpa"
    ).eval()
    batching = ContinuousBatchingConfig(
        num_blocks=256,
        max_batch_tokens=1024,
        max_memory_percent=0.5,
        use_cuda_graph=False,
        allow_block_sharing=False,
    )

    def run(prompts: list[list[int]], output_tokens: int) -> Measurement:
        generation = GenerationConfig(
            do_sample=False, max_new_tokens=output_tokens, eos_token_id=-1, pad_token_id=0
        )
        began = time.perf_counter()
        outputs = model.generate_batch(
            prompts,
            generation_config=generation,
            continuous_batching_config=batching,
            record_timestamps=True,
            progress_bar=False,
        )
        answers = list(outputs.values())
        require_tokens((len(answer.generated_tokens) for answer in answers), output_tokens)
        stamps = [list(answer.timestamps) for answer in answers]
        first_ids = answers[0].generated_tokens
        return from_stamps(work, began, stamps, output_tokens, first_ids=first_ids)

    yield from warmed(work, run)


if __name__ == "__main__":
    serve_work(measure)
