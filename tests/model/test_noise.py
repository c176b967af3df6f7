"""The noise is the function its docstring says, looks like independent uniforms, and the
short way to the largest noisy score finds the same token as the long one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from model import noise

CPU = torch.device("cpu")
VOCAB = 50_257


def keys_of(seeds: list[int], positions: list[int]) -> Tensor:
    words = torch.tensor([noise.seed_words(seed) for seed in seeds], dtype=torch.int32)
    return noise.row_keys(words, torch.tensor(positions, dtype=torch.int32))


def bits_of(seeds: list[int], positions: list[int], vocab_size: int = VOCAB) -> np.ndarray:
    bits = noise.noise_bits(keys_of(seeds, positions), noise.token_words(vocab_size, CPU)[None])
    return bits.numpy()


def uniforms(seeds: list[int], positions: list[int], vocab_size: int = VOCAB) -> np.ndarray:
    return (bits_of(seeds, positions, vocab_size) + 0.5) / 2.0**31


# The algorithm of the docstring, once more, on Python integers.


def mix(x: int, key: int = 0) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x ^= key
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def expected_bits(seed: int, position: int, token_id: int) -> int:
    low, high = seed % 2**32, seed // 2**32
    a = mix(mix((low + 0x9E3779B9) % 2**32) ^ high)
    b = mix(mix((high + 0x85EBCA6B) % 2**32) ^ low)
    t = mix((token_id + 0x9E3779B9) % 2**32)
    return mix(t ^ mix(a ^ position), mix(b ^ position)) % 2**31


# Changing these values changes every seeded answer: a release note, not a refactoring.
GOLDEN = {
    # (seed, position, token id): n
    (0, 0, 0): 1246926178,
    (0, 0, 1): 709151050,
    (0, 1, 0): 1493597442,
    (1, 0, 0): 957298986,
    (1234, 56, 789): 1427592581,
    (2**32, 7, 50_256): 1586951519,
    (2**63 - 1, 131_071, 151_935): 523471257,
}


@pytest.mark.parametrize(("where", "n"), GOLDEN.items())
def test_known_answers(where: tuple[int, int, int], n: int) -> None:
    seed, position, token_id = where
    assert expected_bits(seed, position, token_id) == n
    words = noise.token_words(200_000, CPU)[None, token_id : token_id + 1]
    keys = keys_of([seed], [position])
    assert noise.noise_bits(keys, words).item() == n
    gumbel = -math.log(-math.log1p(-(n + 0.5) / 2**31))
    assert noise.gumbel(keys, words).item() == pytest.approx(gumbel, rel=1e-14)


@given(
    seed=st.integers(0, 2**63 - 1),
    position=st.integers(0, 2**31 - 1),
    token_id=st.integers(0, VOCAB - 1),
)
@settings(max_examples=200, deadline=None)
def test_torch_and_numpy_compute_the_documented_integers(
    seed: int, position: int, token_id: int
) -> None:
    expected = expected_bits(seed, position, token_id)
    keys, words = keys_of([seed], [position]), noise.token_words(VOCAB, CPU)
    assert noise.noise_bits(keys, words[None, token_id : token_id + 1]).item() == expected
    n, scratch = np.empty((1, 1), np.uint32), np.empty((1, 1), np.uint32)
    one_word = words[token_id : token_id + 1].numpy().view(np.uint32)
    noise._noise_bits_numpy(keys.numpy().view(np.uint32), one_word, n, scratch)
    assert n.item() == expected


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_named(seed: int) -> None:
    with pytest.raises(ValueError, match=f"got {seed}"):
        noise.seed_words(seed)


def test_the_ends_are_finite_and_the_float32_recipe_is_accurate() -> None:
    n = torch.tensor([0, 1, 2, 2**20, 2**30 - 1, 2**30, 2**31 - 2, 2**31 - 1], dtype=torch.int32)
    exact = noise._gumbel_of_bits(n)
    assert exact.isfinite().all()
    assert exact[0] == pytest.approx(32 * math.log(2), abs=1e-6)  # the largest, 22.18
    assert exact[-1] == pytest.approx(-math.log(32 * math.log(2)), abs=1e-6)  # the least, -3.10
    assert (exact.diff() < 0).all()
    small = (n.float() + 0.5) * 2.0**-31
    mirrored = ((2**31 - 1 - n).float() + 0.5) * 2.0**-31
    in_float32 = -torch.log(torch.where(n < 2**30, -torch.log1p(-small), -torch.log(mirrored)))
    torch.testing.assert_close(in_float32.double(), exact, rtol=3e-7, atol=3e-7)


# Statistics, at fixed seeds: each asks for a p-value that one honest run in 10^4 would miss.


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5])
def test_uniform_over_tokens_positions_and_seeds(seed: int) -> None:
    over_tokens = uniforms([seed] * 8, list(range(8))).ravel()
    over_positions = uniforms([seed] * 20_000, list(range(20_000)), 8)
    over_seeds = uniforms([seed + i for i in range(20_000)], [3] * 20_000, 8)
    for sample in (over_tokens, over_positions.ravel(), over_positions[:, 5], over_seeds[:, 0]):
        assert stats.kstest(sample, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("shift", [0, 8, 16, 23])
def test_every_byte_is_uniform_and_so_are_neighbours_together(shift: int) -> None:
    bits = bits_of([7] * 16, list(range(100, 116)))
    bytes_ = (bits >> shift) & 0xFF
    assert stats.chisquare(np.bincount(bytes_.ravel(), minlength=256)).pvalue > 1e-4
    nibbles = bytes_ & 0xF
    pairs = nibbles[:, :-1] * 16 + nibbles[:, 1:]  # a token and the next
    assert stats.chisquare(np.bincount(pairs.ravel(), minlength=256)).pvalue > 1e-4
    pairs = nibbles[:-1] * 16 + nibbles[1:]  # a position and the next
    assert stats.chisquare(np.bincount(pairs.ravel(), minlength=256)).pvalue > 1e-4


def test_neighbouring_positions_seeds_and_tokens_are_not_correlated() -> None:
    bound = 4.5 / math.sqrt(VOCAB)  # standard deviations of an honest correlation
    positions = uniforms([11] * 40, list(range(40)))
    seeds = uniforms(list(range(40)), [11] * 40)
    high = uniforms([i << 32 for i in range(40)], [11] * 40)
    for rows in (positions, seeds, high):
        correlation = np.corrcoef(rows) - np.eye(40)
        assert np.abs(correlation).max() < bound
    for lag in (1, 2, 3, 64, 4096):
        for row in positions[:4]:
            assert abs(np.corrcoef(row[:-lag], row[lag:])[0, 1]) < bound


def test_small_changes_of_the_seed_and_position_flip_half_the_bits() -> None:
    base = bits_of([12345], [77])
    changed = bits_of(
        [12345 ^ (1 << i) for i in range(63)] + [12345] * 31,
        [77] * 63 + [77 ^ (1 << i) for i in range(31)],
    )
    flips = np.unpackbits((base ^ changed).view(np.uint8), axis=1).mean(axis=1) * 32 / 31
    assert np.abs(flips - 0.5).max() < 4.5 * 0.5 / math.sqrt(31 * VOCAB)


def test_its_exponentials_have_the_tail_of_exponentials() -> None:
    """What decides a draw is the largest of G: the least of exp(-G) over m tokens is
    exponential with mean 1 / m."""
    vocab_size = 1024
    gumbel = noise.gumbel(
        keys_of([5] * 4096, list(range(4096))), noise.token_words(vocab_size, CPU)[None]
    )
    least = torch.exp(-gumbel.amax(dim=1)).numpy() * vocab_size
    assert stats.kstest(least, "expon").pvalue > 1e-4


# One row or many, all tokens or some.


def test_a_row_is_the_same_alone_and_in_a_batch_and_for_some_of_the_tokens() -> None:
    seeds, positions = [3, 3, 2**50, 9], [0, 1, 0, 5_000]
    words = noise.token_words(VOCAB, CPU)
    together = noise.gumbel(keys_of(seeds, positions), words[None])
    some = torch.tensor([50_256, 0, 17])
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        alone = keys_of([seed], [position])
        assert torch.equal(
            noise.noise_bits(alone, words[None])[0],
            noise.noise_bits(keys_of(seeds, positions), words[None])[row],
        )
        torch.testing.assert_close(
            noise.gumbel(alone, words[None])[0], together[row], rtol=1e-15, atol=1e-15
        )
        torch.testing.assert_close(
            noise.gumbel(alone, words[some][None])[0], together[row, some], rtol=1e-15, atol=1e-15
        )


def test_the_cheap_bound_is_never_below_the_noise() -> None:
    edges = [max(0, min(2**31 - 1, 2**i + d)) for i in range(32) for d in (-2, -1, 0, 1, 2)]
    bits = np.concatenate([edges, bits_of([1], [1])[0]]).astype(np.int32)
    as_number = bits.astype(np.float32).view(np.int32).astype(np.float32)
    bound = as_number * noise._LOG_SLOPE + np.float32(noise._LOG_OFFSET)
    slack = bound - noise._gumbel_of_bits(torch.from_numpy(bits)).numpy()
    assert slack.min() > -noise._SLACK / 10


@pytest.mark.parametrize(
    ("rows", "vocab_size"), [(1, 1), (3, 2), (200, 97), (7, 50_257), (64, 4096)]
)
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 100.0])
def test_argmax_by_bound_is_the_argmax_of_the_dense_sum(
    rows: int, vocab_size: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(rows)
    scores = torch.randn(rows, vocab_size, generator=generator) * spread
    scores[:, 1::7] = -math.inf
    scores -= scores.amax(dim=1, keepdim=True)
    keys = keys_of(list(range(rows)), [5] * rows)
    dense = noise.gumbel(keys, noise.token_words(vocab_size, CPU)[None]) + scores
    assert torch.equal(noise.gumbel_argmax(scores, keys), dense.argmax(dim=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_computes_the_same_bits_and_the_same_tokens() -> None:
    keys = keys_of(list(range(8)), list(range(8)))
    words = noise.token_words(VOCAB, CPU)
    on_cuda = noise.noise_bits(keys.cuda(), noise.token_words(VOCAB, torch.device("cuda"))[None])
    assert torch.equal(on_cuda.cpu(), noise.noise_bits(keys, words[None]))
    scores = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(0))
    scores -= scores.amax(dim=1, keepdim=True)
    on_cuda = noise.gumbel_argmax(scores.cuda(), keys.cuda())
    assert torch.equal(on_cuda.cpu(), noise.gumbel_argmax(scores, keys))
