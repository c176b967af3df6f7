"""Sampling on the device: the kernels against their twins, and both against model/sampling.py."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from model.adjustments import Adjustments
from model.kernels.gpu import draw as draw_module
from model.kernels.gpu.adjust import AdjustRows, adjust, adjust_twin
from model.kernels.gpu.draw import DrawRows, draw, draw_twin
from model.noise import noise_bits, row_keys, seed_words, token_words
from model.sampling import SamplingBatch, SamplingRow, sample
from model.sampling_params import SamplingParams
from tests.model.gpu.setting import DEVICE, int32, normal

CPU = torch.device("cpu")
OFF = float(np.finfo(np.float32).min)


def draw_rows(params: list[SamplingParams], positions: list[int]) -> DrawRows:
    def floats(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=DEVICE)

    return DrawRows(
        floats([1 / p.temperature if p.temperature else 0.0 for p in params]),
        int32([p.top_k for p in params]),
        floats([p.top_p for p in params]),
        floats([math.log(p.min_p) if p.min_p else OFF for p in params]),
        int32([seed_words(p.seed) for p in params]).t().contiguous(),
        int32(positions),
        int32(list(range(len(params)))),
    )


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 2.0]),
        top_k=rng.choice([0, 0, 1, 2, 20, 150, 5000]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.5, 0.01]),
        min_p=rng.choice([0.0, 0.0, 0.05, 0.9]),
        seed=rng.randrange(2**63),
    )


@triton.jit
def _bits_kernel(keys, out, count, width: tl.constexpr):
    token = tl.arange(0, width)
    key0 = tl.load(keys).to(tl.uint32)
    key1 = tl.load(keys + 1).to(tl.uint32)
    bits = draw_module._bits(token, key0, key1)
    tl.store(out + token, bits.to(tl.int32, bitcast=True), mask=token < count)


def test_the_uniform_bits_are_those_of_the_cpu() -> None:
    """Bit for bit, for seeds and positions of all sizes."""
    rng = random.Random(0)
    words = token_words(1000, CPU)
    for seed in (0, 1, 2**32, 2**63 - 1, rng.randrange(2**63)):
        for position in (0, 1, 131_071, 2**31 - 1):
            keys = row_keys(
                torch.tensor([seed_words(seed)], dtype=torch.int32),
                torch.tensor([position], dtype=torch.int32),
            )
            out = torch.empty(1000, dtype=torch.int32, device=DEVICE)
            _bits_kernel[(1,)](keys[0].to(DEVICE), out, 1000, width=1024)
            assert torch.equal(out.cpu(), noise_bits(keys, words[None])[0])


@pytest.mark.parametrize(("vocab_size", "count"), [(211, 30), (5000, 8)])
@pytest.mark.parametrize("ties", [False, True])
def test_draws_what_the_cpu_draws(vocab_size: int, count: int, ties: bool) -> None:
    """Every kind of truncation; with ties at every border, and hardly any distinct logits."""
    rng = random.Random(vocab_size)
    logits = normal(count, vocab_size, seed=vocab_size) * 3
    if ties:
        logits = logits.round()
    params = [random_params(rng) for _ in range(count)]
    positions = [rng.randrange(100_000) for _ in params]
    expected = sample(
        logits.cpu(),
        SamplingBatch.build(
            [SamplingRow(p, at) for p, at in zip(params, positions, strict=True)], vocab_size, CPU
        ),
    )
    rows = draw_rows(params, positions)
    for run in (draw, draw_twin):
        last_tokens = int32([-1] * count)
        token_ids, peaks = run(logits, rows, last_tokens)
        assert token_ids.tolist() == expected.token_ids.tolist(), run.__name__
        assert torch.equal(last_tokens, token_ids)
        assert torch.equal(peaks, logits.amax(dim=-1))


def test_broken_rows_get_token_0_and_say_why() -> None:
    logits = normal(4, 211)
    logits[0, 7], logits[1, 9], logits[2] = math.nan, math.inf, -math.inf
    rows = draw_rows([SamplingParams(seed=i) for i in range(4)], [3] * 4)
    for run in (draw, draw_twin):
        token_ids, peaks = run(logits, rows, int32([0] * 4))
        assert token_ids[:3].tolist() == [0, 0, 0]
        assert peaks[0].isnan()
        assert peaks[1:3].tolist() == [math.inf, -math.inf]
        assert peaks[3].isfinite()


def test_what_is_held_off_is_never_drawn() -> None:
    logits = torch.full((2, 211), -math.inf, device=DEVICE)
    logits[:, 100] = -5.0
    rows = draw_rows([SamplingParams(seed=1), SamplingParams(seed=2, top_k=50, top_p=0.5)], [0, 1])
    for run in (draw, draw_twin):
        assert run(logits, rows, int32([0, 0]))[0].tolist() == [100, 100]


def words_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@pytest.mark.parametrize("unread", [None, 5, 200])
def test_adjusts_as_the_cpu_does(unread: int | None) -> None:
    """To the bit, also when the last token is on the device only: one that is listed already
    (5) and one that is not (200)."""
    vocab_size = 211
    params = SamplingParams(
        repetition_penalty=1.3, presence_penalty=0.1, frequency_penalty=0.7,
        logit_bias={5: 3.3, 9: -100.0, 200: 1.1}, stop_token_ids=(7,), min_tokens=10,
    )  # fmt: skip
    prompt, output = [1, 2, 3, 5], [5, 5, 6, 7]
    known = {t: output.count(t) for t in prompt + output}
    whole = output if unread is None else [*output, unread]
    logits = normal(2, vocab_size) * 4
    adjustments, _ = Adjustments.build([(1, params, prompt, whole)], vocab_size, CPU, (0,))
    expected = adjustments.apply(logits.cpu())

    def amount(count: int) -> int:
        return words_of(0.1 + 0.7 * count if count else 0.0)

    rows = AdjustRows(
        penalty_starts=int32([0, 0, len(known)]),
        penalties=int32([(t, amount(n), amount(n + 1)) for t, n in known.items()]),
        bias_starts=int32([0, 0, 5]),
        biases=int32(
            [(t, words_of(b)) for t, b in params.logit_bias.items()]
            + [(t, words_of(-math.inf)) for t in (7, 0)]
        ),
        repetition=torch.tensor([1.0, 1.3], device=DEVICE),
        unread_seats=int32([-1, -1 if unread is None else 2]),
        unread_amounts=torch.tensor([0.0, 0.1 + 0.7], dtype=torch.float32, device=DEVICE),
    )
    for run in (adjust, adjust_twin):
        ours = logits.clone()
        run(ours, rows, int32([0, 0, unread or 0]))
        assert torch.equal(ours.cpu(), expected), run.__name__
