"""Attention, worked by hand.

Read from top to bottom, these tests tell what

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V

does: a query is compared with every key, the comparisons become shares of one whole, and
the answer is the values mixed in those shares. Then what it may see (the causal mask), and
what it cannot see by itself (the order of the words).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import causal_mask, scaled_dot_product
from model.config import ModelConfig
from model.positions import apply_rotary, rotary_table, sinusoidal_table

# One token asks with the query [2, 3]; three tokens hold up their keys.
QUERY = [2.0, 3.0]
KEYS = [[1.0, 1.0], [1.0, 0.0], [2.0, 1.0]]
VALUES = [[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]]


def softmax_by_hand(scores: list[float]) -> list[float]:
    """exp of each, divided by their sum: positive shares of 1, larger for larger scores."""
    exponentials = [math.exp(score) for score in scores]
    return [each / sum(exponentials) for each in exponentials]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# 1. One query, three keys.


def test_a_score_is_the_dot_product_of_a_query_and_a_key() -> None:
    scores = [sum(q * k for q, k in zip(QUERY, key, strict=True)) for key in KEYS]
    assert scores == [
        2 * 1 + 3 * 1,  # 5
        2 * 1 + 3 * 0,  # 2
        2 * 2 + 3 * 1,  # 7: this key points most where the query points
    ]
    assert (torch.tensor([QUERY]) @ torch.tensor(KEYS).T).tolist() == [[5.0, 2.0, 7.0]]


def test_softmax_turns_scores_into_shares() -> None:
    shares = softmax_by_hand([5.0, 2.0, 7.0])
    assert [round(share, 4) for share in shares] == [0.1185, 0.0059, 0.8756]
    assert torch.softmax(torch.tensor([5.0, 2.0, 7.0]), dim=0).tolist() == pytest.approx(shares)


def test_scaling_by_the_square_root_of_the_dimension_evens_the_shares() -> None:
    """Dot products grow with the number of dimensions, here d_k = 2; divided by sqrt(d_k)
    they do not, and softmax is not pushed to all or nothing."""
    scaled = [score / math.sqrt(2) for score in (5.0, 2.0, 7.0)]
    assert [round(score, 4) for score in scaled] == [3.5355, 1.4142, 4.9497]
    shares = softmax_by_hand(scaled)
    assert [round(share, 4) for share in shares] == [0.1911, 0.0229, 0.7860]

    _, weights = scaled_dot_product(torch.tensor([QUERY]), torch.tensor(KEYS), torch.tensor(VALUES))
    assert weights.tolist()[0] == pytest.approx(shares)


def test_the_output_is_the_values_mixed_in_those_shares() -> None:
    output, _ = scaled_dot_product(torch.tensor([QUERY]), torch.tensor(KEYS), torch.tensor(VALUES))
    # 0.1911 * [10, 0] + 0.0229 * [0, 10] + 0.7860 * [5, 5]
    assert [round(x, 4) for x in output.tolist()[0]] == [5.8409, 4.1591]


def test_equal_keys_share_equally_whatever_is_asked() -> None:
    keys = torch.ones(4, 2)
    _, weights = scaled_dot_product(torch.tensor([QUERY]), keys, torch.zeros(4, 2))
    assert weights.tolist() == [[0.25] * 4]


# 2. Many queries: each row of the weights is one token's attention.


@given(
    num_queries=st.integers(1, 9),
    more_keys=st.integers(0, 9),
    dim=st.integers(1, 8),
    window=st.none() | st.integers(1, 12),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_every_row_of_weights_sums_to_one_and_never_looks_ahead(
    num_queries: int, more_keys: int, dim: int, window: int | None, spread: float, seed: int
) -> None:
    num_keys = num_queries + more_keys  # `more_keys` tokens were there before
    queries, keys = random(2, num_queries, dim, seed=seed), random(2, num_keys, dim, seed=seed + 1)
    visible = causal_mask(num_queries, num_keys, window)
    _, weights = scaled_dot_product(queries * spread, keys, keys, visible)

    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    for query, key in itertools.product(range(num_queries), range(num_keys)):
        own_place = more_keys + query  # the key of the token that asks
        is_ahead = key > own_place
        is_too_old = window is not None and key <= own_place - window
        if is_ahead or is_too_old:
            assert (weights[:, query, key] == 0).all()


def test_the_causal_mask_is_a_staircase() -> None:
    yes, no = True, False
    assert causal_mask(4, 4).tolist() == [
        [yes, no, no, no],
        [yes, yes, no, no],
        [yes, yes, yes, no],
        [yes, yes, yes, yes],
    ]
    # Two new tokens behind three that are in the cache: the staircase's last two steps.
    assert causal_mask(2, 5).tolist() == [
        [yes, yes, yes, yes, no],
        [yes, yes, yes, yes, yes],
    ]
    # A sliding window of 2: itself and the one before.
    assert causal_mask(4, 4, window=2).tolist() == [
        [yes, no, no, no],
        [yes, yes, no, no],
        [no, yes, yes, no],
        [no, no, yes, yes],
    ]


@given(length=st.integers(2, 12), changed=st.integers(1, 11), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_changing_a_later_token_does_not_change_an_earlier_output(
    length: int, changed: int, seed: int
) -> None:
    """Which is why keys and values can be cached: what is computed stays true."""
    changed = min(changed, length - 1)
    tokens = random(length, 4, seed=seed)
    others = tokens.clone()
    others[changed] += 1.0
    mask = causal_mask(length, length)
    before, _ = scaled_dot_product(tokens, tokens, tokens, mask)
    after, _ = scaled_dot_product(others, others, others, mask)
    assert torch.equal(before[:changed], after[:changed])
    assert not torch.allclose(before[changed], after[changed])


def test_a_sliding_window_forgets_what_is_older() -> None:
    tokens = random(6, 4)
    others = tokens.clone()
    others[0] += 1.0
    mask = causal_mask(6, 6, window=3)
    before, _ = scaled_dot_product(tokens, tokens, tokens, mask)
    after, _ = scaled_dot_product(others, others, others, mask)
    assert not torch.allclose(before[:3], after[:3])  # still see token 0
    assert torch.equal(before[3:], after[3:])


def test_the_last_token_alone_sees_what_it_sees_among_all() -> None:
    """Decoding: one query against the cached keys is the last row of the whole."""
    tokens = random(7, 4)
    whole, _ = scaled_dot_product(tokens, tokens, tokens, causal_mask(7, 7))
    last, _ = scaled_dot_product(tokens[-1:], tokens, tokens, causal_mask(1, 7))
    torch.testing.assert_close(last, whole[-1:])


# 3. The order of words.

DOG_BITES_MAN = random(3, 8, seed=42)  # an embedding for each word
ORDERS = [list(order) for order in itertools.permutations(range(3))]
OTHER_ORDERS = ORDERS[1:]


def attend(words: Tensor) -> Tensor:
    """Every word sees every word; queries, keys and values are the words themselves."""
    return scaled_dot_product(words, words, words)[0]


@pytest.mark.parametrize("order", ORDERS)
def test_without_positions_man_bites_dog_means_dog_bites_man(order: list[int]) -> None:
    """Permute the words, and each word's output is what it was, merely elsewhere: attention
    by itself sees a bag of words."""
    permuted = attend(DOG_BITES_MAN[order])
    torch.testing.assert_close(permuted, attend(DOG_BITES_MAN)[order])


@pytest.mark.parametrize("order", OTHER_ORDERS)
def test_with_sinusoidal_positions_the_order_matters(order: list[int]) -> None:
    places = sinusoidal_table(3, 8).double()
    usual, permuted = attend(DOG_BITES_MAN + places), attend(DOG_BITES_MAN[order] + places)
    assert not torch.allclose(permuted, usual[order], atol=1e-3)


def attend_with_rotary(words: Tensor) -> Tensor:
    """The values are not turned: only who looks at whom depends on the places."""
    config = ModelConfig(
        vocab_size=3,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        max_positions=3,
    )
    cos, sin = (table.double()[:, None] for table in rotary_table(config, 3))
    turned = apply_rotary(words[:, None], cos, sin)[:, 0]
    return scaled_dot_product(turned, turned, words)[0]


@pytest.mark.parametrize("order", OTHER_ORDERS)
def test_with_rotary_positions_the_order_matters(order: list[int]) -> None:
    """Rotary scores see only the distance between two words (test_positions.py), and
    dog-bites is not as far as dog-man."""
    usual, permuted = attend_with_rotary(DOG_BITES_MAN), attend_with_rotary(DOG_BITES_MAN[order])
    assert not torch.allclose(permuted, usual[order], atol=1e-3)
