"""RoutingTable: placement in, physical ids out; LiveRouting: epochs only grow."""

from __future__ import annotations

import numpy as np
import pytest

from xdeepserve.errors import ConfigError
from xdeepserve.transformerless.routing import LiveRouting, RoutingTable

IDS = np.array([[0, 2], [2, -1], [1, 2], [2, 0]], np.int32)


def test_identity_changes_nothing() -> None:
    table = RoutingTable.identity(num_layers=2, num_experts=3)
    assert table.to_physical(1, IDS) is IDS
    assert table.num_physical == 3


def test_replicas_are_taken_in_turn_and_skips_stay() -> None:
    table = RoutingTable.from_physical([[2, 0, 1, 2]], num_experts=3, epoch=1)
    assert table.num_replicas.tolist() == [[1, 1, 2]]
    assert table.logical_to_physical[0, 2].tolist() == [0, 3]
    assert table.to_physical(0, IDS).tolist() == [[1, 0], [3, -1], [2, 0], [3, 1]]


def test_layers_have_placements_of_their_own() -> None:
    table = RoutingTable.from_physical([[0, 1], [1, 0]], num_experts=2, epoch=1)
    ids = np.array([[0, 1]], np.int32)
    assert table.to_physical(0, ids).tolist() == [[0, 1]]
    assert table.to_physical(1, ids).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("placed", "message"), [([[0, 0]], "expert 1 has no replica"), ([[0, 5]], "outside")]
)
def test_an_impossible_placement_is_refused(placed: list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RoutingTable.from_physical(placed, num_experts=2, epoch=1)


def test_swap_needs_a_higher_epoch() -> None:
    first = RoutingTable.identity(num_layers=1, num_experts=2, epoch=4)
    live = LiveRouting(first)
    with pytest.raises(ConfigError, match="routing epoch 4"):
        live.swap(first)
    second = RoutingTable.identity(num_layers=1, num_experts=2, epoch=5)
    live.swap(second)
    assert live.current is second
