"""Vitrine's own engine without HTTP: `EngineCore` stepped until nothing is left to do."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from loadtests.peers.work import Measurement, PeerError, Work, from_stamps, serve_work, warmed
from model.sampling_params import GREEDY, SamplingParams
from service.engine.core import EngineCore
from service.engine.messages import EngineConfig, Submit
from service.engine.start import start_engine

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


def measure(work: Work) -> Iterator[Measurement]:
    """Every batch through one engine, with its default settings."""
    config = EngineConfig(
        model_dir=work.checkpoint,
        device="cpu",
        dtype=DTYPES[work.dtype],
        max_num_seqs=max(64, *work.batches),
        threads=work.threads,
    )
    core, _ = start_engine(config)
    request_ids = itertools.count(1)

    def run(prompts: list[list[int]], output_tokens: int) -> Measurement:
        return _run(core, work, prompts, output_tokens, request_ids)

    yield from warmed(work, run)


def _run(
    core: EngineCore,
    work: Work,
    prompts: list[list[int]],
    output_tokens: int,
    request_ids: Iterator[int],
) -> Measurement:
    params = SamplingParams(max_tokens=output_tokens, temperature=GREEDY, ignore_eos=True)
    stamps: dict[int, list[float]] = {}
    token_ids: dict[int, list[int]] = {}
    began = time.perf_counter()
    for prompt in prompts:
        request_id = next(request_ids)
        stamps[request_id], token_ids[request_id] = [], []
        core.add(Submit(request_id, prompt, params))
    while core.has_work:
        outputs = core.step()
        now = time.perf_counter()
        for output in outputs:
            if output.error is not None:
                raise PeerError(output.error)
            stamps[output.id] += [now] * len(output.token_ids)
            token_ids[output.id] += output.token_ids
    return from_stamps(
        work, began, list(stamps.values()), output_tokens, first_ids=next(iter(token_ids.values()))
    )


if __name__ == "__main__":
    serve_work(measure)
