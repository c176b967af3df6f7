"""A forward that raises: only the sequence at fault ends (law 6)."""

from __future__ import annotations

from unittest.mock import patch

import torch

from model.sampling import SampledTokens
from service.engine.profile import StepProfile
from service.engine.runner import Runner
from service.engine.scheduler import Scheduled
from tests.engine.engines import make_core, random_model, run_all, submit

POISON = 13


def prompts() -> list[list[int]]:
    return [[POISON if i == 5 else 20 + i, 3, 4] for i in range(12)]


def test_the_guilty_sequence_is_found_by_halves_and_the_others_keep_their_bits() -> None:
    model = random_model()
    requests = [submit(i, prompt, max_tokens=6, seed=i) for i, prompt in enumerate(prompts())]
    expected = run_all(make_core(model), [r for r in requests if r.id != 5])
    healthy, sizes = Runner.run, []

    def run(self: Runner, step: list[Scheduled], profile: StepProfile) -> SampledTokens:
        sizes.append(len(step))
        healthy(self, step, profile)  # the cache is written before it goes wrong
        if any(item.sequence.token_ids[0] == POISON for item in step):
            raise RuntimeError("no step with this one")
        return healthy(self, step, profile)

    with patch.object(Runner, "run", run):
        results = run_all(make_core(model), requests)
    guilty = results.pop(5)
    assert (guilty.finish_reason, guilty.token_ids) == ("error", [])
    assert "no step with this one" in str(guilty.error)
    assert results == expected
    assert sizes[:9] == [12, 6, 3, 3, 1, 2, 1, 1, 6], "halves, not one by one"


def test_what_a_broken_sequence_computed_reaches_nobody() -> None:
    """A prompt whose keys and values are NaN: whoever gets its blocks next, with the same first
    tokens or not, gets what it would have got without it."""
    model = random_model()
    core = make_core(
        model, num_blocks=8, max_num_seqs=8, max_batched_tokens=8
    )  # 20 tokens come in three chunks
    requests = [submit(i, [40 + i] * 20, max_tokens=12, seed=i) for i in range(2)]
    expected = run_all(
        make_core(model, num_blocks=8, max_num_seqs=8, max_batched_tokens=8), requests
    )
    embedding = model.embedding.weight
    healthy = embedding[40].clone()
    with torch.inference_mode():
        embedding[40] = torch.nan  # what a faulty memory may do
    broken = run_all(core, [submit(7, [40] * 20, max_tokens=12)])[7]
    assert (broken.finish_reason, broken.token_ids) == ("error", [])
    assert core.scheduler.pool.num_free == 8, "nothing of it is remembered"
    with torch.inference_mode():
        embedding[40] = healthy
    assert run_all(core, requests) == expected
