"""Chained content keys of full KV blocks.

A key names the whole prefix that ends with the block: it hashes the parent's key and the block's
token ids, starting from a root that carries the tenant's cache salt. Keys are a pure function of
(salt, block size, token ids), equal in every process and on every machine.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

_DIGEST_BYTES = 32
_DOMAIN = b"xdeepserve-kv/1"


class BlockKey(NamedTuple):
    """Identity of one full block.

    Attributes:
        digest: 32 bytes; covers the salt and all tokens from position 0 to the block's end.
        payload: the block's own token ids, little-endian int32; compared on every hit.
    """

    digest: bytes
    payload: bytes


def root_digest(cache_salt: str, block_size: int) -> bytes:
    """The parent digest of a sequence's first block."""
    seed = _DOMAIN + struct.pack("<I", block_size) + cache_salt.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(seed, digest_size=_DIGEST_BYTES).digest()


class BlockHashChain:
    """The keys of one sequence's full blocks, extended as the sequence grows."""

    __slots__ = ("_block_size", "_pack", "_root", "keys")

    def __init__(self, *, cache_salt: str, block_size: int) -> None:
        self._block_size = block_size
        self._pack = struct.Struct(f"<{block_size}i").pack
        self._root = root_digest(cache_salt, block_size)
        self.keys: list[BlockKey] = []

    def extend(self, token_ids: Sequence[int], num_blocks: int) -> None:
        """Make `keys` at least `num_blocks` long.

        Args:
            token_ids: the whole sequence from position 0; ids below the keys already made must
                not have changed. Holds at least num_blocks * block_size ids.
            num_blocks: keys wanted.

        Cost: one blake2b over 32 + 4 * block_size bytes per new key.
        """
        while len(self.keys) < num_blocks:
            start = len(self.keys) * self._block_size
            payload = self._pack(*token_ids[start : start + self._block_size])
            parent = self.keys[-1].digest if self.keys else self._root
            digest = hashlib.blake2b(parent + payload, digest_size=_DIGEST_BYTES).digest()
            self.keys.append(BlockKey(digest, payload))
