"""test_mixing.py in short, with the GPU's kernels in Triton's interpreter: the same bits in any
company, in chunks, from the cache, preempted, resumed, overlapped or not."""

from __future__ import annotations

import random

import pytest

from service.engine.messages import Submit
from tests.engine.engines import VOCAB_SIZE, Result, run_all, submit
from tests.engine.test_mixing import Setup, alone, gpu_setup


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "overlapped"])
def setup(request: pytest.FixtureRequest) -> Setup:
    return gpu_setup(overlap=request.param)


def short_requests() -> list[Submit]:
    """Five, two of which share their beginning; every kind of sampling."""
    rng = random.Random(3)
    system = [rng.randrange(1, VOCAB_SIZE) for _ in range(18)]
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.8},
        {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "min_p": 0.05},
        {"temperature": 1.0, "logprobs": None, "presence_penalty": 0.4},
        {"temperature": 1.0, "logit_bias": {5: 3.0, 9: -100.0}, "min_tokens": 1},
    ]
    requests = []
    for i, kind in enumerate(kinds):
        prompt = [rng.randrange(1, VOCAB_SIZE) for _ in range((3, 14, 15, 5, 14)[i])]
        prompt = system + prompt if i in (0, 3) else prompt
        requests.append(submit(i, prompt, max_tokens=3 + i % 2, seed=i, ignore_eos=True, **kind))
    return requests


@pytest.fixture(scope="module")
def expected() -> dict[int, Result]:
    """What each request gets by itself, its prompt in one step, nothing cached."""
    return {one.id: alone(gpu_setup(overlap=False), one) for one in short_requests()}


def test_requests_get_what_each_gets_alone(setup: Setup, expected: dict[int, Result]) -> None:
    core = setup.core(num_blocks=5, max_batched_tokens=24)
    results = run_all(core, short_requests())
    assert core.stats().preemptions > 0
    for request_id, result in expected.items():
        assert results[request_id] == result, f"request {request_id}"


def test_a_sequence_that_goes_on_elsewhere_draws_the_same_tokens() -> None:
    setup = gpu_setup(overlap=True)
    request = submit(1, [3, 1, 4, 1, 5], max_tokens=4, seed=9, ignore_eos=True)
    whole = alone(setup, request)
    rest = Submit(1, request.prompt_token_ids, request.sampling, 0, whole.token_ids[:2])
    resumed = run_all(setup.core(), [rest])[1]
    assert resumed.token_ids == whole.token_ids[2:]
    assert resumed.logprobs == whole.logprobs[2:]
