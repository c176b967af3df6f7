"""What the comparison with rivals calls a rate."""

from __future__ import annotations

import pytest

from loadtests.peers.work import Work, from_stamps


def work(batch: int) -> Work:
    return Work(
        shape="gpt2",
        dtype="fp32",
        what="decode",
        batches=(batch,),
        prompt_tokens=10,
        output_tokens=7,
        threads=2,
        vocab_size=1000,
        folder="",
        checkpoint="",
        seed=0,
    )


def test_decode_is_what_all_sequences_write_together() -> None:
    """Two begin a second apart and write a token each half second while both run, four a second
    while one does: neither the first one's start nor the last one's rest counts."""
    first = [1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0]
    last = [2.0, 2.5, 3.0, 3.25, 3.5, 3.75, 4.0]
    found = from_stamps(work(2), 0.0, [first, last], 7)
    assert found.decode_tokens_per_s == pytest.approx(4.0)  # four tokens from 2.0 to 3.0
    assert found.prefill_tokens_per_s == pytest.approx(10.0)  # 20 until 2.0
    assert found.end_to_end_tokens_per_s == pytest.approx(3.5)  # 14 until 4.0


def test_without_a_moment_together_there_is_no_decode() -> None:
    found = from_stamps(work(2), 0.0, [[1.0, 1.5], [2.0, 2.5]], 2)
    assert found.decode_tokens_per_s is None
