"""KVCacheManager: match, allocate, commit and free the KV blocks of sequences.

The scheduler holds one opaque `KVBlocks` per request and never sees pool or index. Works on ints
alone: where the KV bytes are, and what a block holds, is the executor's business.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

from xdeepserve.errors import IntegrityError
from xdeepserve.rtc.block_hash import BlockHashChain
from xdeepserve.rtc.block_pool import BlockPool
from xdeepserve.rtc.prefix_cache import PrefixCache


class KVBlocks:
    """The blocks of one sequence in order of position. Only KVCacheManager changes it.

    Attributes:
        block_ids: int32 array; read it, but keep no view of it across a scheduler call.
        chain: content keys made so far; they stay valid when the blocks are given back.
        num_committed: leading blocks that the prefix cache has seen.
    """

    __slots__ = ("block_ids", "chain", "num_committed")

    def __init__(self, chain: BlockHashChain) -> None:
        self.block_ids: array[int] = array("i")
        self.chain = chain
        self.num_committed = 0

    def __len__(self) -> int:
        return len(self.block_ids)

    def __repr__(self) -> str:
        return f"KVBlocks({self.block_ids.tolist()}, committed={self.num_committed})"


class KVCacheManager:
    """Block ownership of one DP group. Thread: the step loop."""

    def __init__(self, *, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache(num_blocks)

    @property
    def num_total_blocks(self) -> int:
        """Size of the pool."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks no sequence holds; cached ones count, because they can be evicted at once."""
        return self._pool.num_free

    @property
    def num_cached_blocks(self) -> int:
        """Blocks whose content can be found by prefix."""
        return len(self._cache)

    def open(self, *, cache_salt: str) -> KVBlocks:
        """An empty handle for one new sequence, whose ids only ever grow; holds nothing yet."""
        return KVBlocks(BlockHashChain(cache_salt=cache_salt, block_size=self.block_size))

    def match(self, blocks: KVBlocks, token_ids: Sequence[int]) -> int:
        """Take the longest cached prefix of `token_ids` into an empty handle.

        At least one token is left to compute, so a sequence that is cached whole still yields
        logits.

        Returns:
            Number of tokens whose KV is there: a multiple of block_size, below len(token_ids).
        """
        if len(blocks) != 0:
            raise IntegrityError(f"match() needs an empty handle, got {blocks!r}")
        if not self._prefix_caching:
            return 0
        num_blocks = (len(token_ids) - 1) // self.block_size
        blocks.chain.extend(token_ids, num_blocks)
        for key in blocks.chain.keys[:num_blocks]:
            block_id = self._cache.lookup(key)
            if block_id is None:
                break
            self._pool.acquire(block_id)
            blocks.block_ids.append(block_id)
        blocks.num_committed = len(blocks)
        return len(blocks) * self.block_size

    def allocate(self, blocks: KVBlocks, *, num_tokens: int, num_reserved: int = 0) -> bool:
        """Grow the handle so that it can hold the KV of `num_tokens` tokens.

        Args:
            blocks: the handle.
            num_tokens: tokens from position 0.
            num_reserved: free blocks that must be left over when any block is taken.

        Returns:
            False when too few blocks are free; then nothing was taken.
        """
        num_new = -(-num_tokens // self.block_size) - len(blocks)
        if num_new <= 0:
            return True
        if num_new + num_reserved > self._pool.num_free:
            return False
        for _ in range(num_new):
            block_id = self._pool.allocate()
            self._cache.evict(block_id)
            blocks.block_ids.append(block_id)
        return True

    def commit(self, blocks: KVBlocks, token_ids: Sequence[int], *, num_computed: int) -> None:
        """Make the full blocks among the first `num_computed` tokens available to others.

        Call it only when their KV has been written.
        """
        num_full = num_computed // self.block_size
        if num_full <= blocks.num_committed or not self._prefix_caching:
            return
        blocks.chain.extend(token_ids, num_full)
        for idx in range(blocks.num_committed, num_full):
            self._cache.insert(blocks.chain.keys[idx], blocks.block_ids[idx])
        blocks.num_committed = num_full

    def free(self, blocks: KVBlocks) -> None:
        """Give every block back; the handle is empty afterwards and can be used again.

        Committed content stays findable until its block is needed; the tail of a sequence is
        evicted before its head, which more sequences may share.
        """
        for block_id in reversed(blocks.block_ids):
            self._pool.release(block_id, reuse_last=self._cache.holds(block_id))
        del blocks.block_ids[:]
        blocks.num_committed = 0

    def check_integrity(self, holders: Iterable[KVBlocks]) -> None:
        """Check that the given handles account for every reference; O(num_blocks).

        Raises:
            IntegrityError: a block leaked, was freed twice, or is held by nobody listed.
        """
        self._pool.check_integrity()
        self._cache.check_integrity()
        held = Counter(block_id for blocks in holders for block_id in blocks.block_ids)
        for block_id in range(self._pool.num_blocks):
            count = self._pool.ref_count(block_id)
            if count != held[block_id]:
                raise IntegrityError(
                    f"KV block {block_id}: ref_count={count}, but {held[block_id]} holders"
                )
