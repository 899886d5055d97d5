"""PrefixCache: content key -> the block that holds its KV.

An index only: it holds no references, so an entry lives until its block is allocated anew.
"""

from __future__ import annotations

from xdeepserve.errors import IntegrityError
from xdeepserve.rtc.block_hash import BlockKey


class PrefixCache:
    """One-to-one map between keys and blocks. Every operation is O(1)."""

    def __init__(self, num_blocks: int) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: list[BlockKey | None] = [None] * num_blocks

    def __len__(self) -> int:
        return len(self._block_of)

    def holds(self, block_id: int) -> bool:
        """Whether the block's content can be found again."""
        return self._key_of[block_id] is not None

    def lookup(self, key: BlockKey) -> int | None:
        """The block with this content, or None.

        The token ids are compared too, so a digest collision is a miss, never wrong KV.
        """
        block_id = self._block_of.get(key.digest)
        if block_id is None:
            return None
        found = self._key_of[block_id]
        return block_id if found is not None and found.payload == key.payload else None

    def insert(self, key: BlockKey, block_id: int) -> None:
        """Index a full, computed block; the first block with a given content wins."""
        if self._key_of[block_id] is None and key.digest not in self._block_of:
            self._block_of[key.digest] = block_id
            self._key_of[block_id] = key

    def evict(self, block_id: int) -> None:
        """Forget the block's content, if it was indexed."""
        key = self._key_of[block_id]
        if key is not None:
            del self._block_of[key.digest]
            self._key_of[block_id] = None

    def check_integrity(self) -> None:
        """Check that both directions agree; O(num_blocks).

        Raises:
            IntegrityError: they do not.
        """
        indexed = 0
        for block_id, key in enumerate(self._key_of):
            if key is None:
                continue
            indexed += 1
            if self._block_of.get(key.digest) != block_id:
                raise IntegrityError(f"prefix cache lost the key of block {block_id}")
        if indexed != len(self._block_of):
            raise IntegrityError(
                f"prefix cache has {len(self._block_of)} keys for {indexed} blocks"
            )
