"""PrefixCache: first content wins, eviction, and verification on a hit."""

from __future__ import annotations

import pytest

from xdeepserve.errors import IntegrityError
from xdeepserve.rtc.block_hash import BlockKey
from xdeepserve.rtc.prefix_cache import PrefixCache

KEY = BlockKey(b"digest-a", b"tokens-a")


def test_lookup_finds_the_first_block_until_it_is_evicted() -> None:
    cache = PrefixCache(4)
    cache.insert(KEY, 2)
    cache.insert(KEY, 3)
    assert cache.lookup(KEY) == 2
    assert not cache.holds(3)
    cache.evict(2)
    cache.evict(3)
    assert cache.lookup(KEY) is None
    cache.check_integrity()


def test_a_digest_collision_is_a_miss() -> None:
    cache = PrefixCache(4)
    cache.insert(KEY, 2)
    assert cache.lookup(BlockKey(KEY.digest, b"tokens-b")) is None


def test_check_integrity_sees_a_wrong_entry() -> None:
    cache = PrefixCache(4)
    cache.insert(KEY, 2)
    cache._block_of[KEY.digest] = 1
    with pytest.raises(IntegrityError, match="block 2"):
        cache.check_integrity()
