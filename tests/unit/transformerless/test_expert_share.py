"""ExpertShare: takes what would be waited for, gives back what is too much, never takes all."""

from __future__ import annotations

import numpy as np
import pytest

from xdeepserve.transformerless.expert_share import MAX_SHARE, READING_ROWS, ExpertShare

NUM_EXPERTS = 8


def ids(*rows: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.asarray(rows, np.int32)


def after(num_waits: int, num_rows: int) -> ExpertShare:
    share = ExpertShare()
    for _ in range(num_waits):
        share.learn(num_rows, was_ready=False)
    return share


def test_nothing_is_taken_before_anything_was_waited_for() -> None:
    assert ExpertShare().choose(ids((0, 1), (2, 3)), NUM_EXPERTS) is None


def test_the_share_follows_the_waits_and_stays_in_bounds() -> None:
    share = after(10_000, num_rows=4)
    assert share.share(4) == MAX_SHARE
    share.learn(4, was_ready=True)
    assert 0 < share.share(4) < MAX_SHARE
    for _ in range(10_000):
        share.learn(4, was_ready=True)
    assert share.share(4) == 0.0


def test_sizes_are_learned_apart() -> None:
    share = after(50, num_rows=64)
    assert share.share(127) == share.share(64) > 0
    assert share.share(4) == 0.0


@pytest.mark.parametrize("num_waits", [10, 32, 64, 100])
def test_the_work_taken_is_the_share_up_to_one_expert(num_waits: int) -> None:
    rng = np.random.default_rng(num_waits)
    topk_ids = rng.integers(0, NUM_EXPERTS, (64, 2)).astype(np.int32)
    share = after(num_waits, len(topk_ids))
    is_taken = share.choose(topk_ids, NUM_EXPERTS)
    assert is_taken is not None
    costs = np.bincount(topk_ids.ravel(), minlength=NUM_EXPERTS) + READING_ROWS
    taken, wanted = costs[is_taken].sum(), share.share(64) * costs.sum()
    assert abs(taken - wanted) <= costs.max()


def test_something_is_always_asked_of_others() -> None:
    share = after(10_000, num_rows=1)
    assert share.choose(ids((5, 5)), NUM_EXPERTS) is None
    both = share.choose(ids((5, 2)), NUM_EXPERTS)
    assert both is not None
    assert both[[2, 5]].sum() == 1


def test_skipped_slots_count_for_nothing() -> None:
    share = after(10_000, num_rows=2)
    assert share.choose(ids((-1, -1), (-1, -1)), NUM_EXPERTS) is None
    is_taken = share.choose(ids((-1, 3), (-1, 4)), NUM_EXPERTS)
    assert is_taken is not None
    assert is_taken[[3, 4]].sum() == 1
