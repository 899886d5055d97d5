"""KVCacheManager: what is matched, taken, published and given back."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xdeepserve.errors import IntegrityError
from xdeepserve.rtc import KVBlocks, KVCacheManager

BLOCK = 4


def manager(num_blocks: int = 8, *, prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(num_blocks=num_blocks, block_size=BLOCK, prefix_caching=prefix_caching)


def computed(kv: KVCacheManager, token_ids: list[int], *, salt: str = "") -> KVBlocks:
    """A sequence whose tokens are all computed and published."""
    blocks = kv.open(cache_salt=salt)
    kv.match(blocks, token_ids)
    assert kv.allocate(blocks, num_tokens=len(token_ids))
    kv.commit(blocks, token_ids, num_computed=len(token_ids))
    return blocks


def test_a_prefix_is_shared_while_held_and_found_after_free() -> None:
    kv = manager()
    ids = list(range(10))
    first = computed(kv, ids)
    second = kv.open(cache_salt="")
    assert kv.match(second, [*ids[:8], 77]) == 8
    assert second.block_ids[:2] == first.block_ids[:2]
    assert kv.num_free_blocks == 5
    kv.check_integrity([first, second])
    kv.free(first)
    kv.free(second)
    assert kv.num_free_blocks == 8
    assert kv.match(second, ids) == 8
    kv.free(second)


def test_a_full_hit_leaves_a_token_to_compute() -> None:
    kv = manager()
    ids = list(range(8))
    kv.free(computed(kv, ids))
    again = kv.open(cache_salt="")
    assert kv.match(again, ids) == 4
    kv.free(again)
    assert kv.match(again, [*ids, 8]) == 8


def test_only_full_computed_blocks_are_published() -> None:
    kv = manager()
    ids = list(range(12))
    blocks = kv.open(cache_salt="")
    assert kv.allocate(blocks, num_tokens=12)
    kv.commit(blocks, ids, num_computed=7)
    other = kv.open(cache_salt="")
    assert kv.match(other, ids) == 4
    assert kv.num_cached_blocks == 1


def test_salts_do_not_share() -> None:
    kv = manager()
    ids = list(range(9))
    computed(kv, ids, salt="a")
    other = kv.open(cache_salt="b")
    assert kv.match(other, ids) == 0


def test_the_least_recently_freed_content_is_evicted_first_and_tails_before_heads() -> None:
    kv = manager(4)
    old, young = [1] * 8, [2] * 8
    old_blocks, young_blocks = computed(kv, old), computed(kv, young)
    kv.free(old_blocks)
    kv.free(young_blocks)
    taker = kv.open(cache_salt="x")
    assert kv.allocate(taker, num_tokens=BLOCK)
    for ids, num_hit in ((young, 8), (old, 4)):
        probe = kv.open(cache_salt="")
        assert kv.match(probe, [*ids, 0]) == num_hit
        kv.free(probe)
    kv.check_integrity([taker])


def test_allocate_takes_nothing_when_it_fails() -> None:
    kv = manager(4)
    blocks = kv.open(cache_salt="")
    assert not kv.allocate(blocks, num_tokens=17)
    assert not kv.allocate(blocks, num_tokens=9, num_reserved=2)
    assert len(blocks) == 0
    assert kv.allocate(blocks, num_tokens=9, num_reserved=1)
    assert kv.allocate(blocks, num_tokens=12, num_reserved=99)
    assert kv.num_free_blocks == 1


def test_matching_into_a_handle_in_use_is_an_integrity_error() -> None:
    kv = manager()
    blocks = computed(kv, list(range(5)))
    with pytest.raises(IntegrityError, match="empty handle"):
        kv.match(blocks, list(range(5)))


def test_check_integrity_sees_a_forgotten_handle() -> None:
    kv = manager()
    computed(kv, list(range(5)))
    with pytest.raises(IntegrityError, match="0 holders"):
        kv.check_integrity([])


def test_without_prefix_caching_nothing_is_found() -> None:
    kv = manager(prefix_caching=False)
    ids = list(range(9))
    kv.free(computed(kv, ids))
    blocks = kv.open(cache_salt="")
    assert kv.match(blocks, ids) == 0
    assert kv.num_cached_blocks == 0


class KVMachine(RuleBasedStateMachine):
    """Random sequences over a small alphabet; a model of contents checks every hit."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = manager(6)
        self.contents: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.live: list[tuple[str, list[int], KVBlocks]] = []

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=20), salt=st.sampled_from("ab"))
    def start(self, ids: list[int], salt: str) -> None:
        blocks = self.kv.open(cache_salt=salt)
        num_hit = self.kv.match(blocks, ids)
        assert num_hit < len(ids)
        for idx, block_id in enumerate(blocks.block_ids):
            assert self.contents[block_id] == (salt, tuple(ids[: (idx + 1) * BLOCK]))
        if not self.kv.allocate(blocks, num_tokens=len(ids)):
            self.kv.free(blocks)
            return
        for idx in range(num_hit // BLOCK, len(blocks)):
            prefix = tuple(ids[: (idx + 1) * BLOCK])
            self.contents[blocks.block_ids[idx]] = (salt, prefix)
        self.kv.commit(blocks, ids, num_computed=len(ids))
        self.live.append((salt, ids, blocks))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        idx = data.draw(st.integers(0, len(self.live) - 1))
        self.kv.free(self.live.pop(idx)[2])

    @invariant()
    def adds_up(self) -> None:
        self.kv.check_integrity(blocks for _, _, blocks in self.live)
        held = {block_id for _, _, blocks in self.live for block_id in blocks.block_ids}
        assert self.kv.num_free_blocks == 6 - len(held)


TestKVMachine = KVMachine.TestCase
TestKVMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
