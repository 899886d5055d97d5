"""RoutingTable: placement in, instances and their ranks out; LiveRouting: epochs only grow."""

from __future__ import annotations

import numpy as np
import pytest

from xdeepserve.errors import ConfigError
from xdeepserve.transformerless.routing import LiveRouting, RoutingTable

IDS = np.array([[0, 2], [2, -1], [1, 2], [2, 0]], np.int32)


def build(placed: list[list[int]], ranks: tuple[int, ...] = (7, 9), **more: int) -> RoutingTable:
    return RoutingTable.build(placed, num_experts=3, expert_ranks=ranks, **more)


def test_without_replicas_an_instance_is_its_expert() -> None:
    table = build([[2, 0, 1, -1]])
    assert table.instances(0, IDS) is IDS
    assert table.rank_of_instance.tolist() == [[7, 9, 7]]


def test_replicas_are_taken_in_turn_by_row_and_skips_stay() -> None:
    table = build([[2, 0, 1, 2]])
    assert table.num_replicas.tolist() == [[1, 1, 2]]
    assert table.rank_of_instance.tolist() == [[7, 9, 7, -1, -1, 9]]
    assert table.instances(0, IDS).tolist() == [[0, 2], [5, -1], [1, 2], [5, 0]]


def test_layers_have_placements_of_their_own() -> None:
    table = build([[0, 1, 2, -1], [2, -1, 1, 0]])
    assert table.rank_of_instance.tolist() == [[7, 7, 9], [9, 9, 7]]


def test_without_expert_ranks_the_asker_computes() -> None:
    table = RoutingTable.build(
        np.zeros((2, 0), np.int32), num_experts=3, expert_ranks=(), ffn_ranks=(4,)
    )
    assert (table.expert_ranks, table.ffn_ranks) == ((), (4,))
    assert table.expert_owners({4}).shape == (2, 0)


def test_a_lost_rank_is_replaced_by_a_replica_else_by_any_rank_else_by_nobody() -> None:
    table = build([[2, 0, 1, 2, 1, -1]], ranks=(7, 9, 5))
    # experts 0, 1, 2 and then the second replicas of each
    assert table.rank_of_instance.tolist() == [[7, 9, 7, -1, 5, 9]]
    assert table.expert_owners(()) is table.rank_of_instance
    assert table.expert_owners({7}).tolist() == [[9, 9, 9, -1, 5, 9]]
    assert table.expert_owners({9}).tolist() == [[7, 5, 7, -1, 5, 7]]
    assert table.expert_owners({7, 9}).tolist() == [[5, 5, 5, -1, 5, 5]]
    assert table.expert_owners({5, 7, 9}).tolist() == [[-1, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        ([[0, 0, 1, 1]], "expert 2 has no replica"),
        ([[0, 5, 1, 2]], "outside"),
        ([[0, 1, 2]], "equally many slots"),
    ],
)
def test_an_impossible_placement_is_refused(placed: list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(placed)


def test_swap_needs_a_higher_epoch() -> None:
    first = build([[0, 1, 2, -1]], epoch=4)
    live = LiveRouting(first)
    with pytest.raises(ConfigError, match="routing epoch 4"):
        live.swap(first)
    second = build([[0, 1, 2, -1]], epoch=5)
    live.swap(second)
    assert live.current is second
