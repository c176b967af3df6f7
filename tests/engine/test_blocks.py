"""The block pool under random use: law 2, free + referenced + cached == total, always."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from service.engine.blocks import (
    ROOT_HASH,
    BlockPool,
    ConservationError,
    OutOfBlocksError,
    block_hash,
)


class PoolMachine(RuleBasedStateMachine):
    """Takes, shares, remembers and releases at random beside a plain model of the pool:
    a list of who holds what, and a dictionary of known prefixes."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=12, block_size=4)
        self.holders: dict[int, int] = {}
        self.known: dict[bytes, int] = {}
        self.counter = 0

    @rule(target=held, count=st.integers(0, 5))
    def allocate(self, count: int) -> list[int]:
        if count > self.pool.num_available:
            before = (self.pool.num_free, self.pool.num_cached)
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(count)
            assert (self.pool.num_free, self.pool.num_cached) == before
            return []
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        for block in blocks:
            assert self.holders.get(block, 0) == 0, "a held block was handed out again"
            self.holders[block] = 1
            self.known = {h: b for h, b in self.known.items() if b != block}
        return blocks

    @rule(blocks=held)
    def remember(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.holders.get(block, 0) and block not in self.known.values():
                self.counter += 1
                value = block_hash(ROOT_HASH, [self.counter])
                self.pool.remember(block, value)
                self.known[value] = block

    @precondition(lambda self: self.known)
    @rule(target=held, data=st.data())
    def share(self, data: st.DataObject) -> list[int]:
        value = data.draw(st.sampled_from(sorted(self.known)))
        found = self.pool.find([value, b"unknown", value])
        assert found == [self.known[value]], "the longest known prefix ends at the first unknown"
        self.pool.share(found)
        self.holders[found[0]] = self.holders.get(found[0], 0) + 1
        return found

    @rule(blocks=consumes(held))
    def release(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        for block in blocks:
            self.holders[block] -= 1

    @invariant()
    def books_add_up(self) -> None:
        self.pool.check()
        referenced = sum(1 for count in self.holders.values() if count)
        assert self.pool.num_referenced == referenced
        idle_known = [b for b in self.known.values() if not self.holders.get(b)]
        assert self.pool.num_cached == len(idle_known)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_released_prefix_is_found_again_until_its_room_is_needed() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    first = pool.allocate(2)
    hashes = [block_hash(ROOT_HASH, [1, 2])]
    hashes.append(block_hash(hashes[0], [3, 4]))
    for block, value in zip(first, hashes, strict=True):
        pool.remember(block, value)
    pool.release(first)
    assert (pool.num_free, pool.num_cached) == (2, 2)
    assert pool.find(hashes) == first

    pool.allocate(3)  # two free ones and one cached: the end of the chain goes first
    assert pool.find(hashes) == first[:1]


def test_the_hash_of_a_block_depends_on_everything_before_it() -> None:
    one, other = block_hash(ROOT_HASH, [1, 2]), block_hash(ROOT_HASH, [2, 1])
    assert block_hash(one, [3, 4]) != block_hash(other, [3, 4])


def test_releasing_twice_is_a_bug_and_says_so() -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ConservationError, match="released more often than taken"):
        pool.release(blocks)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0)])
def test_an_empty_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        BlockPool(num_blocks, block_size)
