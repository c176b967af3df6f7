"""The attention kernels against the equation, and their promises to the bit."""

from __future__ import annotations

import pytest
import torch

from model.kernels.gpu import decode, prefill
from model.kernels.gpu.decode import Splits, decode_attention, decode_attention_twin
from model.kernels.gpu.prefill import prefill_attention, prefill_attention_twin
from tests.model.gpu.setting import Pages, close, int32, normal

# heads, KV heads, head_dim, block_size, window, dtype
SHAPES = [
    (8, 2, 64, 16, None, torch.float32),
    (6, 2, 20, 8, None, torch.float32),
    (4, 4, 32, 32, 50, torch.float32),
    (3, 1, 128, 16, 300, torch.bfloat16),
    (4, 1, 80, 16, None, torch.float16),
]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block", "window", "dtype"), SHAPES)
@pytest.mark.parametrize("max_len", [256, 1024])
def test_decode_equals_the_equation(
    heads: int, kv_heads: int, dim: int, block: int, window: int | None, dtype: torch.dtype,
    max_len: int,
) -> None:  # fmt: skip
    """In one split and in several; a context of 0 is a padding row and gives zeros."""
    lengths = [1, 63, 64, 0, 200, max_len]
    pages = Pages.of(lengths, num_kv_heads=kv_heads, head_dim=dim, block_size=block, dtype=dtype)
    queries = normal(7, heads, dim, dtype=dtype, seed=3)
    rows = int32([6, 1, 2, 3, 0, 5])
    ours, theirs = torch.full_like(queries, 7.0), torch.full_like(queries, 7.0)
    for run, out in ((decode_attention, ours), (decode_attention_twin, theirs)):
        run(
            queries, pages.keys, pages.values, pages.tables, pages.context_lens, rows, window,
            Splits.of(max_len), out,
        )  # fmt: skip
    assert close(ours, theirs)
    assert not ours[3].any()
    assert (ours[4] == 7.0).all(), "a row that is nobody's"


def test_splits_are_whole_tiles_that_cover_the_context() -> None:
    for max_len in (1, 256, 257, 4096, 8192, 100_000, 131_072):
        splits = Splits.of(max_len)
        assert splits.tokens % decode.TILE == 0
        assert splits.count <= decode.MAX_SPLITS
        assert splits.tokens * (splits.count - 1) < max_len <= splits.tokens * splits.count


def test_decode_gives_a_row_the_same_bits_in_any_company() -> None:
    lengths = [700, 30, 257]
    pages = Pages.of(lengths, num_kv_heads=2, head_dim=32, block_size=16)
    queries = normal(3, 4, 32)
    together = torch.empty_like(queries)
    splits = Splits.of(1024)
    decode_attention(
        queries, pages.keys, pages.values, pages.tables, pages.context_lens, int32([0, 1, 2]),
        None, splits, together,
    )  # fmt: skip
    for i in range(3):
        alone = torch.empty_like(queries)
        decode_attention(
            queries, pages.keys, pages.values, pages.tables[i : i + 1],
            pages.context_lens[i : i + 1], int32([i]), None, splits, alone,
        )  # fmt: skip
        assert torch.equal(alone[i], together[i])


def run_prefill(
    pages: Pages, queries: torch.Tensor, lengths: list[int], window: int | None, run: object
) -> torch.Tensor:
    """The last `lengths` tokens of each sequence of the pages."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    step = prefill.queries_per_tile(queries.shape[1], pages.values.shape[1])
    tiles = [(seq, at) for seq, n in enumerate(lengths) for at in range(0, n, step)]
    out = torch.zeros_like(queries)
    run(  # type: ignore[operator]
        queries, pages.keys, pages.values, pages.tables, int32(starts), pages.context_lens,
        (int32([t[0] for t in tiles]), int32([t[1] for t in tiles])), window, out,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block", "window", "dtype"), SHAPES)
def test_prefill_equals_the_equation(
    heads: int, kv_heads: int, dim: int, block: int, window: int | None, dtype: torch.dtype
) -> None:
    """Whole prompts, chunks after a cached context, and single tokens."""
    contexts, lengths = [100, 70, 130, 1, 90], [100, 1, 33, 1, 65]
    pages = Pages.of(contexts, num_kv_heads=kv_heads, head_dim=dim, block_size=block, dtype=dtype)
    queries = normal(sum(lengths), heads, dim, dtype=dtype, seed=3)
    ours = run_prefill(pages, queries, lengths, window, prefill_attention)
    assert close(ours, run_prefill(pages, queries, lengths, window, prefill_attention_twin))


@pytest.mark.parametrize("window", [None, 40])
def test_prefill_gives_a_token_the_same_bits_however_its_prompt_is_cut(window: int | None) -> None:
    """Whole, in its last tokens alone, and by itself, as a decoded token is."""
    pages = Pages.of([150], num_kv_heads=2, head_dim=32, block_size=16)
    queries = normal(150, 6, 32)
    whole = run_prefill(pages, queries, [150], window, prefill_attention)
    for length in (77, 20, 1):
        part = run_prefill(pages, queries[-length:], [length], window, prefill_attention)
        assert torch.equal(part, whole[-length:])
