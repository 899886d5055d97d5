"""BlockPool: eviction order, reference counts, and errors on misuse."""

from __future__ import annotations

import pytest

from xdeepserve.errors import IntegrityError
from xdeepserve.rtc.block_pool import BlockPool


def test_blocks_come_back_in_eviction_order() -> None:
    pool = BlockPool(4)
    taken = [pool.allocate() for _ in range(4)]
    assert taken == [0, 1, 2, 3]
    pool.release(2, reuse_last=True)
    pool.release(0, reuse_last=True)
    pool.release(3, reuse_last=False)
    assert [pool.allocate() for _ in range(3)] == [3, 2, 0]


def test_a_shared_block_is_free_after_its_last_release() -> None:
    pool = BlockPool(1)
    block_id = pool.allocate()
    pool.acquire(block_id)
    pool.release(block_id, reuse_last=True)
    assert pool.num_free == 0
    pool.release(block_id, reuse_last=True)
    assert pool.num_free == 1
    pool.acquire(block_id)
    assert pool.ref_count(block_id) == 1
    pool.check_integrity()


def test_double_free_and_empty_pool_are_integrity_errors() -> None:
    pool = BlockPool(1)
    block_id = pool.allocate()
    with pytest.raises(IntegrityError, match="all 1 KV blocks"):
        pool.allocate()
    pool.release(block_id, reuse_last=True)
    with pytest.raises(IntegrityError, match="double free"):
        pool.release(block_id, reuse_last=True)


def test_check_integrity_sees_a_lost_block() -> None:
    pool = BlockPool(2)
    del pool._free[1]
    with pytest.raises(IntegrityError, match="KV block 1"):
        pool.check_integrity()
