"""The KV block pool: who holds which block, and which blocks hold a known prefix.

A block is in one of three states, and their counts always add up to the pool (law 2):

    free        nobody holds it and it holds nothing worth keeping
    referenced  one or more sequences hold it
    cached      nobody holds it, but its contents are known by their hash: a later sequence
                with the same prefix takes it back; the least recently released goes first
                when room is needed

Plain Python; the tensors live in `model/kv_cache.py`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq

ROOT_HASH = b""


class OutOfBlocksError(Exception):
    """More blocks were asked for than are not referenced."""


class ConservationError(Exception):
    """The pool's books do not add up: a bug, never a load condition."""


def block_hash(parent: bytes, token_ids: Seq[int]) -> bytes:
    """Hash of a full block and of everything before it (`parent` is the hash of that).

    Cryptographic, because a collision would show one client another's text.
    """
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """Reference counts, prefix hashes and eviction for `num_blocks` blocks."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks {num_blocks} and block_size {block_size} must be >= 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest release first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones, then cached ones."""
        return self.num_free + self.num_cached

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, each referenced once; evicts cached ones when free ones run out.

        Raises `OutOfBlocksError` (and takes nothing) when there are not enough.
        """
        if count > self.num_available:
            raise OutOfBlocksError(f"{count} blocks wanted, {self.num_available} available")
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            taken.append(block)
        return taken

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix of this chain of hashes."""
        found = []
        for value in hashes:
            block = self._block_of.get(value)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these would leave the available ones if they were shared."""
        return sum(1 for block in blocks if self._references[block] == 0)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that `find` returned."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Seq[int]) -> None:
        """Drop a reference of each; what nobody holds becomes cached or free.

        Given in sequence order and dropped from the end: a prefix outlives what hangs on it.
        """
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise ConservationError(f"block {block} released more often than taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def remember(self, block: int, value: bytes) -> None:
        """Say that a full, computed block holds the prefix with this hash. When another
        block already does, that one stays the known one."""
        if self._hash_of[block] is None and value not in self._block_of:
            self._hash_of[block] = value
            self._block_of[value] = block

    def forget(self, blocks: Seq[int]) -> list[int]:
        """Say that the contents of referenced blocks are not to be found again; who holds one
        keeps it. Returns those with a single holder."""
        for block in blocks:
            self._forget(block)
        return [block for block in blocks if self._references[block] == 1]

    def check(self) -> None:
        """Raise `ConservationError` unless free + referenced + cached == total."""
        referenced = sum(1 for count in self._references if count > 0)
        idle = set(self._free) | set(self._cached)
        if (
            len(idle) != self.num_available
            or referenced + len(idle) != self.num_blocks
            or any(self._references[block] for block in idle)
        ):
            raise ConservationError(
                f"free {self.num_free} + cached {self.num_cached} + referenced {referenced} "
                f"!= total {self.num_blocks}"
            )

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        value, self._hash_of[block] = self._hash_of[block], None
        if value is not None:
            del self._block_of[value]
