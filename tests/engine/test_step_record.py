"""What the engine says of each step: what was in it, where its time went, what it had to do."""

from __future__ import annotations

import pytest
import torch

from service.engine.traffic import traffic_of
from tests.engine.engines import TINY, make_core, random_model, submit

PROMPT = list(range(1, 31))


def test_a_prompt_in_chunks_then_decodes_beside_another_prompt() -> None:
    core = make_core(random_model(), max_batched_tokens=20)
    core.traffic = traffic_of(TINY, torch.float32)
    assert core.step_record() is None, "no step yet"
    core.add(submit(1, PROMPT, max_tokens=8, ignore_eos=True))
    shapes, needs = [], []
    for number in range(4):
        if number == 3:
            core.add(submit(2, PROMPT[::-1], max_tokens=1))
        core.step()
        record = core.step_record()
        assert record is not None
        shapes.append((record.num_sequences, record.num_decodes, record.num_tokens))
        needs.append((record.num_bytes, record.flops))
        parts = (record.schedule_s, record.build_s, record.forward_s, record.sample_s)
        assert 0 < sum(parts) <= record.step_s
    assert shapes == [(1, 0, 20), (1, 0, 10), (1, 1, 1), (2, 1, 20)]
    step = core.traffic.step
    assert needs == [
        step([(0, 20)], 0),
        step([(20, 10)], 1),
        step([(30, 1)], 1),
        step([(31, 1), (0, 19)], 1),
    ]


def test_a_step_that_computes_nothing_says_nothing() -> None:
    core = make_core(random_model())
    core.add(submit(1, [], max_tokens=1))  # refused: an empty prompt
    (output,) = core.step()
    assert output.finish_reason == "error"
    assert core.step_record() is None


def test_the_prefix_cache_is_counted_in_tokens() -> None:
    core = make_core(random_model(), block_size=8)
    for number in (1, 2):
        core.add(submit(number, PROMPT, max_tokens=1))
        while core.has_work:
            core.step()
    stats = core.stats()
    assert (stats.cache_queries, stats.cache_hits) == (60, 24)
    assert stats.prompt_tokens == pytest.approx(60 - 24)
