"""OpenVINO GenAI's continuous batching pipeline: paged attention, precision set explicitly.

Left to itself OpenVINO computes an fp32 model in bf16 with an 8-bit cache where the processor
can; compute and cache precision are therefore both named.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import openvino
import openvino_genai

from loadtests.peers.folder import Folder
from loadtests.peers.work import Measurement, Work, from_stamps, require_tokens, serve_work, warmed

# int8 is of the weights; computed in bf16, as here.
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}
CACHE_GB = 2


def measure(work: Work) -> Iterator[Measurement]:
    """Every batch through one pipeline."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_seqs = max(64, *work.batches)
    scheduler.max_num_batched_tokens = 1024
    scheduler.enable_prefix_caching = False
    properties = {
        "INFERENCE_NUM_THREADS": work.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISIONS[work.dtype],
        "KV_CACHE_PRECISION": PRECISIONS[work.dtype],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    model = str(Folder(Path(work.folder)).openvino(work.shape, work.dtype))
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)

    def run(prompts: list[list[int]], output_tokens: int) -> Measurement:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        began = time.perf_counter()
        handles = [
            pipeline.add_request(
                index, openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)), config
            )
            for index, prompt in enumerate(prompts)
        ]
        stamps: list[list[float]] = [[] for _ in prompts]
        token_ids: list[list[int]] = [[] for _ in prompts]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter()
            for index, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        stamps[index] += [now] * len(output.generated_ids)
                        token_ids[index] += output.generated_ids
        require_tokens(map(len, token_ids), output_tokens)
        return from_stamps(work, began, stamps, output_tokens, first_ids=token_ids[0])

    yield from warmed(work, run)


if __name__ == "__main__":
    serve_work(measure)
