"""BlockPool: which KV block ids are in use, by how many holders, and which is reused next.

Owns reference counts and the free queue. Knows nothing of contents: whether a free block still
holds cached KV only decides at which end of the queue it waits.
"""

from __future__ import annotations

from collections import OrderedDict

from xdeepserve.errors import IntegrityError


class BlockPool:
    """A fixed set of block ids 0 .. num_blocks - 1. Every operation on a block is O(1)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        # Front = reused next. A plain dict would scan tombstones when popped from the front.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self._free)

    def allocate(self) -> int:
        """Take the next free block with one reference; its former content is forfeit.

        Raises:
            IntegrityError: none is free; the caller must check `num_free` first.
        """
        if not self._free:
            raise IntegrityError(f"allocate(): all {self.num_blocks} KV blocks are held")
        block_id, _ = self._free.popitem(last=False)
        self._ref_counts[block_id] = 1
        return block_id

    def acquire(self, block_id: int) -> None:
        """Add a reference to a block, free or held, keeping its content."""
        if self._ref_counts[block_id] == 0:
            del self._free[block_id]
        self._ref_counts[block_id] += 1

    def release(self, block_id: int, *, reuse_last: bool) -> None:
        """Drop one reference; with the last one the block becomes free.

        Args:
            block_id: a held block.
            reuse_last: wait at the end of the free queue (content worth keeping) or at its front.

        Raises:
            IntegrityError: the block is not held (a double free).
        """
        count = self._ref_counts[block_id]
        if count == 0:
            raise IntegrityError(f"double free of KV block {block_id}")
        self._ref_counts[block_id] = count - 1
        if count == 1:
            self._free[block_id] = None
            self._free.move_to_end(block_id, last=reuse_last)

    def ref_count(self, block_id: int) -> int:
        """Number of holders of a block."""
        return self._ref_counts[block_id]

    def check_integrity(self) -> None:
        """Compare counts with the free queue; O(num_blocks).

        Raises:
            IntegrityError: free and held blocks do not add up, or a count is negative.
        """
        for block_id, count in enumerate(self._ref_counts):
            if count < 0 or (count == 0) != (block_id in self._free):
                raise IntegrityError(
                    f"KV block {block_id}: ref_count={count}, in free queue: "
                    f"{block_id in self._free}"
                )
        held = sum(count > 0 for count in self._ref_counts)
        if held + len(self._free) != self.num_blocks:
            raise IntegrityError(
                f"KV blocks lost: {held} held + {len(self._free)} free != {self.num_blocks}"
            )
