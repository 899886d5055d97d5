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


@pytest.mark.parametrize("turn", [0, 1, 2, 2**40])
def test_single_rows_take_turns_too(turn: int) -> None:
    table = build([[2, 0, 1, 2]])
    one_row = np.array([[2, 0]], np.int32)
    instances = table.instances(0, one_row, turn)
    assert instances.tolist() == [[2 + 3 * (turn % 2), 0]]
    assert instances.dtype == np.int32


def test_layers_have_placements_of_their_own() -> None:
    table = build([[0, 1, 2, -1], [2, -1, 1, 0]])
    assert table.rank_of_instance.tolist() == [[7, 7, 9], [9, 9, 7]]


@pytest.mark.parametrize("seed", range(5))
def test_replicas_are_numbered_in_the_order_of_their_slots(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_experts, ranks = 7, (3, 8, 4)
    row = [*range(num_experts), *rng.integers(-1, num_experts, 8)]
    placed = rng.permuted(np.tile(row, (4, 1)), axis=1)
    table = RoutingTable.build(placed, num_experts=num_experts, expert_ranks=ranks)
    by_replica = table.rank_of_instance.reshape(4, -1, num_experts)
    for layer_idx, expert in np.ndindex(4, num_experts):
        owners = [ranks[slot // 5] for slot in np.flatnonzero(placed[layer_idx] == expert)]
        nobody = [-1] * (by_replica.shape[1] - len(owners))
        assert by_replica[layer_idx, :, expert].tolist() == owners + nobody
        assert table.num_replicas[layer_idx, expert] == len(owners)


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
