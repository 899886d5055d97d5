"""The published algorithm, against its own published example."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.eplb.loads import skewed
from xdeepserve.eplb import check_placement, rebalance_experts
from xdeepserve.errors import ConfigError

EXAMPLE_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
EXAMPLE_PLACEMENT = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example() -> None:
    placement = rebalance_experts(np.array(EXAMPLE_LOAD), 16, 4, 2, 8)
    assert placement.physical_to_logical.tolist() == EXAMPLE_PLACEMENT
    assert placement.num_replicas[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert placement.logical_to_physical[0, 5].tolist() == [0, 2]
    assert placement.logical_to_physical[0, 0].tolist() == [12, -1]


def test_groups_stay_on_one_node() -> None:
    placement = rebalance_experts(skewed(1, 3, 32), 40, 8, 4, 8)
    node_of_slot = np.arange(40) // 10
    for row in placement.physical_to_logical:
        for group in range(8):
            assert np.unique(node_of_slot[row // 4 == group]).size == 1
    check_placement(placement, slots_per_rank=5)


def test_groups_that_the_nodes_do_not_divide_are_ignored() -> None:
    load = skewed(2, 2, 12)
    grouped = rebalance_experts(load, 16, 3, 2, 4)
    plain = rebalance_experts(load, 16, 1, 1, 4)
    assert np.array_equal(grouped.physical_to_logical, plain.physical_to_logical)


@pytest.mark.parametrize(
    ("num_replicas", "num_groups", "num_nodes", "num_ranks", "message"),
    [
        (15, 1, 1, 8, "num_replicas by num_ranks"),
        (8, 1, 1, 8, "at least 12 experts"),
        (16, 5, 1, 8, "num_experts by num_groups"),
        (12, 2, 2, 3, "num_ranks by num_nodes"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(
    num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        rebalance_experts(np.array(EXAMPLE_LOAD), num_replicas, num_groups, num_nodes, num_ranks)
