"""ExpertPlacement: its three tables, its invariant, resizing and slot alignment."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from xdeepserve.eplb import EMPTY, ExpertPlacement, check_placement, num_loads, resize
from xdeepserve.eplb.placement import align_slots
from xdeepserve.errors import ConfigError, IntegrityError


def placement(table: list[list[int]], *, num_ranks: int = 2) -> ExpertPlacement:
    return ExpertPlacement.from_physical(table, num_experts=4, num_ranks=num_ranks)


def test_the_tables_agree() -> None:
    placed = placement([[2, 0, 1, -1, 2, 3], [3, 3, 3, 0, 1, 2]])
    assert placed.num_replicas.tolist() == [[1, 1, 2, 1], [1, 1, 1, 3]]
    assert placed.logical_to_physical[0].tolist() == [
        [1, -1, -1],
        [2, -1, -1],
        [0, 4, -1],
        [5, -1, -1],
    ]
    assert placed.logical_to_physical[1, 3].tolist() == [0, 1, 2]
    assert placed.replicas_on_ranks()[1].tolist() == [[0, 0, 0, 3], [1, 1, 1, 0]]
    check_placement(placed, slots_per_rank=3)


@pytest.mark.parametrize("table", [[[0, 1, 4, 2]], [[0, 1, -2, 2]], [[0, 1, 2]], [0, 1, 2, 3]])
def test_a_wrong_table_is_refused(table: list[list[int]]) -> None:
    with pytest.raises(ConfigError):
        placement(table)


def test_a_missing_expert_breaks_the_invariant() -> None:
    with pytest.raises(IntegrityError, match="layer 0: expert 3 has no replica"):
        check_placement(placement([[0, 1, 2, -1]]))


def test_a_full_rank_breaks_the_invariant() -> None:
    with pytest.raises(IntegrityError, match="rank 0 holds 3 experts, more than its 2"):
        check_placement(placement([[0, 1, 2, 3, -1, -1]]), slots_per_rank=2)


def test_tables_that_contradict_each_other_break_the_invariant() -> None:
    placed = placement([[0, 1, 2, 3]])
    wrong = dataclasses.replace(placed, num_replicas=placed.num_replicas + 1)
    with pytest.raises(IntegrityError, match="contradict"):
        check_placement(wrong)


def test_contiguous_is_in_order_and_even() -> None:
    placed = ExpertPlacement.contiguous(num_layers=1, num_experts=4, num_ranks=3)
    assert placed.physical_to_logical.tolist() == [[0, 1, 2, EMPTY, 3, EMPTY]]
    check_placement(placed)


def test_resize_adds_and_removes() -> None:
    placed = placement([[0, 1, 2, 3]])
    wider = resize(placed, num_ranks=3, slots_per_rank=3)
    assert wider.physical_to_logical.tolist() == [[0, 1, -1, 2, 3, -1, -1, -1, -1]]
    one = resize(placed, num_ranks=1, slots_per_rank=2)
    assert one.physical_to_logical.tolist() == [[0, 1]]
    assert one.num_replicas.tolist() == [[1, 1, 0, 0]]
    packed = resize(placement([[-1, 1, 3, -1]]), num_ranks=2, slots_per_rank=1)
    assert packed.physical_to_logical.tolist() == [[1, 3]]
    with pytest.raises(ConfigError, match="slots_per_rank=1"):
        resize(placed, num_ranks=2, slots_per_rank=1)


def test_what_stays_on_a_rank_keeps_its_slot() -> None:
    current = placement([[0, 1, 2, 3, 0, 0]])
    target = placement([[1, 3, 0, 2, 2, 0]])
    aligned = align_slots(target, current)
    assert aligned.physical_to_logical.tolist() == [[0, 1, 3, 2, 0, 2]]
    assert np.array_equal(aligned.replicas_on_ranks(), target.replicas_on_ranks())
    assert num_loads(current, target) == num_loads(current, aligned) == 2


def test_placements_of_different_shape_do_not_compare() -> None:
    with pytest.raises(ConfigError, match="differ in shape"):
        num_loads(placement([[0, 1, 2, 3]]), placement([[0, 1, 2, 3]], num_ranks=4))
