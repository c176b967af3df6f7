"""Laws 4, 5 and 6 on a real (small, random) transformer: a request's tokens and the bits of
its log-probabilities do not depend on the company it keeps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from model.compiled import CompiledForward
from model.config import ModelConfig
from model.forward import Forward
from model.kernels.gpu.kernels import TRITON
from model.kv_cache import KVCache
from model.transformer import Transformer
from service.engine.core import EngineCore
from service.engine.messages import Submit
from tests.engine.engines import (
    EOS,
    TINY_COMPILED,
    TINY_GPT2,
    VOCAB_SIZE,
    Result,
    collect,
    make_core,
    make_device_core,
    random_model,
    run_all,
    submit,
)
from tests.model.gpu.setting import DEVICE

POISON = VOCAB_SIZE - 1


@dataclass(frozen=True)
class Setup:
    """A model and what runs it; None: plain torch."""

    model: Transformer
    block_size: int
    make_forward: Callable[[Transformer, KVCache], Forward] | None = None
    on_device: bool | None = None  # a GPU's engine, and whether it overlaps its steps

    @property
    def num_requests(self) -> int:
        """For the long test: plain torch is slow."""
        return 200 if self.make_forward else 50

    def core(self, *, num_blocks: int = 64, max_batched_tokens: int = 256) -> EngineCore:
        if self.on_device is not None:
            return make_device_core(
                self.model,
                num_blocks=num_blocks,
                block_size=self.block_size,
                max_batched_tokens=max_batched_tokens,
                overlap=self.on_device,
                buckets=(1, 4, 16),
                kernels=TRITON,
                is_deterministic=True,
            )
        return make_core(
            self.model,
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_batched_tokens=max_batched_tokens,
            make_forward=self.make_forward,
        )


def plain_setup() -> Setup:
    """What serves where nothing can be packed or compiled."""
    return Setup(random_model(), 8)


def served_setup(config: ModelConfig, dtype: torch.dtype, *, int8: bool = False) -> Setup:
    """As it is served: compiled."""
    make_forward = partial(CompiledForward, int8=int8)
    return Setup(random_model(config).to(dtype), 16, make_forward)


def gpu_setup(*, overlap: bool) -> Setup:
    """A GPU's engine, on a GPU; in Triton's interpreter it takes minutes (test_mixing_gpu.py)."""
    config = replace(TINY_COMPILED, num_layers=1, sliding_windows=(20,))
    model = random_model(config).to(DEVICE)
    model.place_position_tables(DEVICE)
    return Setup(model, 16, on_device=overlap)


SETUPS: dict[str, Callable[[], Setup]] = {
    "torch fp32": plain_setup,
    "torch bf16": lambda: Setup(random_model().to(torch.bfloat16), 8),
    "compiled fp32": lambda: served_setup(TINY_COMPILED, torch.float32),
    "compiled bf16": lambda: served_setup(TINY_COMPILED, torch.bfloat16),
    "compiled int8": lambda: served_setup(TINY_COMPILED, torch.bfloat16, int8=True),
    "gpt2 fp32": lambda: served_setup(TINY_GPT2, torch.float32),
}
if torch.cuda.is_available():
    SETUPS["gpu"] = lambda: gpu_setup(overlap=False)
    SETUPS["gpu, overlapped"] = lambda: gpu_setup(overlap=True)


@pytest.fixture(scope="module", params=SETUPS)
def setup(request: pytest.FixtureRequest) -> Setup:
    return SETUPS[request.param]()


def random_requests(count: int, seed: int) -> list[Submit]:
    """All kinds of lengths and sampling settings; some prompts share their beginning."""
    rng = random.Random(seed)
    system = [rng.randrange(1, VOCAB_SIZE) for _ in range(24)]
    requests = []
    for sequence_id in range(count):
        prompt = [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.choice([1, 2, 7, 30, 90]))]
        if rng.random() < 0.3:
            prompt = system + prompt
        sampling: dict[str, object] = {
            "max_tokens": rng.choice([1, 5, 20, 40]),
            "seed": rng.randrange(2**63),
            "temperature": rng.choice([0.0, 0.0, 0.7, 1.0]),
            "ignore_eos": rng.random() < 0.5,
            "logprobs": rng.choice([None, 0, 3]),
        }
        if rng.random() < 0.4:
            sampling |= {"top_k": rng.choice([0, 1, 20]), "top_p": rng.choice([1.0, 0.8])}
        if rng.random() < 0.3:
            sampling |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "min_p": 0.05}
        if rng.random() < 0.2:
            sampling |= {"logit_bias": {5: 3.0, 9: -100.0}, "min_tokens": 1}
        requests.append(submit(sequence_id, prompt, **sampling))
    return requests


def alone(setup: Setup, request: Submit) -> Result:
    """The request by itself, its prompt in one step, nothing cached."""
    return run_all(setup.core(), [request])[request.id]


def run_with_arrivals(core: EngineCore, requests: list[Submit], seed: int) -> dict[int, Result]:
    """Requests arrive at random moments while others run."""
    rng = random.Random(seed)
    results: dict[int, Result] = {}
    pending = list(requests)
    while pending or core.has_work:
        for _ in range(rng.choice([0, 0, 1, 4])):
            if pending:
                core.add(pending.pop(0))
        collect(core.step(), results)
    core.scheduler.pool.check()
    assert core.scheduler.pool.num_referenced == 0
    return results


@pytest.mark.slow
def test_many_random_requests_get_what_each_gets_alone(setup: Setup) -> None:
    """In a crowd, in chunks, from a cached prefix, preempted or not: bit for bit."""
    requests = random_requests(setup.num_requests, seed=1)
    # A quarter of what 16 of them want at once, and enough for the longest alone.
    lengths = [len(one.prompt_token_ids) + one.sampling.max_tokens for one in requests]
    num_tokens = max(sum(lengths) * 16 // len(lengths) // 4, max(lengths) + setup.block_size)
    core = setup.core(num_blocks=num_tokens // setup.block_size, max_batched_tokens=48)
    results = run_with_arrivals(core, requests, seed=2)
    assert core.stats().preemptions > 0
    for request in requests:
        assert results[request.id] == alone(setup, request), f"request {request}"


def test_a_dozen_random_requests_get_what_each_gets_alone(setup: Setup) -> None:
    """The quick sibling of the test above."""
    requests = random_requests(12, seed=3)
    core = setup.core(num_blocks=320 // setup.block_size, max_batched_tokens=48)
    results = run_with_arrivals(core, requests, seed=4)
    for request in requests:
        assert results[request.id] == alone(setup, request), f"request {request}"


def test_a_sequence_that_goes_on_elsewhere_draws_the_same_tokens(setup: Setup) -> None:
    """What a new engine does after the old one died: prompt and output so far, same seed."""
    request = submit(1, [3, 1, 4, 1, 5], max_tokens=20, seed=9, ignore_eos=True)
    whole = alone(setup, request)
    for done in (1, 7, 19):
        rest = Submit(1, request.prompt_token_ids, request.sampling, 0, whole.token_ids[:done])
        resumed = run_all(setup.core(), [rest])[1]
        assert resumed.token_ids == whole.token_ids[done:]
        assert resumed.logprobs == whole.logprobs[done:]


def test_a_cached_prefix_changes_nothing(setup: Setup) -> None:
    prompt = list(range(1, 60))
    core = setup.core()
    first = run_all(core, [submit(1, prompt, max_tokens=10, temperature=0.0)])[1]
    core.add(submit(2, prompt, max_tokens=10, temperature=0.0))
    results: dict[int, Result] = {}
    outputs = core.step()
    assert outputs[0].cached_prompt_tokens == 58 // setup.block_size * setup.block_size
    collect(outputs, results)
    while core.has_work:
        collect(core.step(), results)
    assert results[2] == first


def test_an_exception_costs_only_the_sequence_that_causes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The forward raises whenever the poisoned token is in the batch."""
    setup = plain_setup()
    model = setup.model
    forward = model.forward

    def poisoned(input_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        if (input_ids == POISON).sum() >= 5:  # five in a row: only the prompt below
            raise RuntimeError("poison")
        return forward(input_ids, *rest)  # type: ignore[arg-type]

    requests = random_requests(8, seed=5)
    expected = {request.id: alone(setup, request) for request in requests}
    monkeypatch.setattr(model, "forward", poisoned)
    poison = submit(99, [POISON] * 5, max_tokens=5)
    results = run_all(setup.core(), [*requests[:4], poison, *requests[4:]])
    assert results[99].finish_reason == "error"
    assert results[99].error == "RuntimeError: poison"
    for request in requests:
        assert results[request.id] == expected[request.id]


def test_logits_that_are_not_finite_end_their_sequence_only() -> None:
    setup = plain_setup()
    model = setup.model
    model.embedding.weight[7] = float("nan")
    good, bad = submit(1, [1, 2, 3], max_tokens=3), submit(2, [7, 2], max_tokens=3)
    expected = alone(setup, good)
    results = run_all(setup.core(), [good, bad])
    assert results[1] == expected
    assert results[2].finish_reason == "error"
    assert results[2].error is not None
    assert "logits hold nan" in results[2].error


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (submit(1, [], max_tokens=5), "the prompt is empty"),
        (submit(1, [1, VOCAB_SIZE], max_tokens=5), "token ids must lie in 0 .. 210"),
        (submit(1, [1] * 250, max_tokens=7), "need 257 positions; the context has 256"),
    ],
)
def test_what_cannot_run_is_answered_with_the_numbers(request_: Submit, reason: str) -> None:
    results = run_all(make_core(random_model()), [request_])
    assert results[1].finish_reason == "error"
    assert reason in (results[1].error or "")


def test_abort_frees_blocks_before_the_next_step() -> None:
    core = make_core(random_model())
    core.add(submit(1, [1] * 30, max_tokens=50, ignore_eos=True))
    core.step()
    assert core.stats().referenced_blocks == 4
    core.abort(1)
    core.abort(1)  # again is nothing to do
    assert core.stats().referenced_blocks == 0
    assert not core.has_work


@pytest.mark.parametrize("min_tokens", [0, 1, 3, 6])
def test_a_stop_id_ends_at_its_first_place_that_min_tokens_allows(min_tokens: int) -> None:
    """Held off before, and not a token longer: of every id that greedy text holds."""
    setup = plain_setup()
    greedy = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    free = alone(setup, submit(1, [5, 6], **greedy)).token_ids
    for stop in set(free[min_tokens:]) - set(free[:min_tokens]):
        request = submit(1, [5, 6], **greedy, stop_token_ids=(stop,), min_tokens=min_tokens)
        stopped = alone(setup, request)
        assert stopped.finish_reason == "stop"
        assert stopped.token_ids == free[: free.index(stop) + 1]


@pytest.mark.parametrize("min_tokens", [0, 1, 4])
def test_end_of_text_ends_once_min_tokens_are_there(min_tokens: int) -> None:
    """A bias makes end-of-text certain from the first moment it is not held off."""
    request = submit(
        1, [5, 6], max_tokens=12, temperature=0.0, min_tokens=min_tokens, logit_bias={EOS: 100.0}
    )
    result = alone(plain_setup(), request)
    assert result.finish_reason == "stop"
    assert len(result.token_ids) == min_tokens + 1
    assert result.token_ids[-1] == EOS
