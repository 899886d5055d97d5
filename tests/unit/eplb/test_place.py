"""place_experts: valid, deterministic, never worse than the published one, stable."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.eplb.loads import Load, skewed, with_hottest
from xdeepserve.eplb import (
    ExpertPlacement,
    check_placement,
    lower_bound,
    num_loads,
    peak_over_mean,
    place_experts,
    rank_load,
    rebalance_experts,
    resize,
)
from xdeepserve.errors import ConfigError

CLOSE = 1 + 1e-9


def peak(load: Load, placement: ExpertPlacement) -> Load:
    return rank_load(load, placement).max(axis=1)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Load, int, int, int, int]:
    """(load, num_replicas, num_groups, num_nodes, num_ranks) that the published one accepts."""
    num_nodes = draw(st.sampled_from([1, 2, 3]))
    num_ranks = num_nodes * draw(st.integers(1, 4))
    num_groups = num_nodes * draw(st.integers(1, 2))
    num_experts = num_groups * draw(st.integers(1, 4))
    smallest = -(-num_experts // num_ranks)
    slots_per_rank = draw(st.integers(smallest, smallest + 2))
    num_layers = draw(st.integers(1, 3))
    values = st.integers(0, 10_000) | st.just(0)
    size = num_layers * num_experts
    flat = draw(st.lists(values, min_size=size, max_size=size))
    load = np.array(flat, np.float64).reshape(num_layers, num_experts)
    return load, slots_per_rank * num_ranks, num_groups, num_nodes, num_ranks


@settings(max_examples=150, deadline=None)
@given(problems())
def test_never_worse_than_the_published_algorithm(
    problem: tuple[Load, int, int, int, int],
) -> None:
    load, num_replicas, num_groups, num_nodes, num_ranks = problem
    ours = place_experts(
        load,
        num_replicas=num_replicas,
        num_ranks=num_ranks,
        num_groups=num_groups,
        num_nodes=num_nodes,
    )
    published = rebalance_experts(load, num_replicas, num_groups, num_nodes, num_ranks)
    bound = lower_bound(
        load,
        num_replicas=num_replicas,
        num_ranks=num_ranks,
        num_groups=num_groups,
        num_nodes=num_nodes,
    )
    check_placement(ours, slots_per_rank=num_replicas // num_ranks)
    assert (ours.num_replicas.sum(axis=1) <= num_replicas).all()
    assert np.allclose(rank_load(load, ours).sum(axis=1), load.sum(axis=1))
    assert (peak(load, ours) <= peak(load, published) * CLOSE).all()
    assert (bound <= peak(load, ours) * CLOSE).all()


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2**32))
def test_a_current_placement_is_repaired_within_the_tolerance(
    problem: tuple[Load, int, int, int, int], seed: int
) -> None:
    load, num_replicas, num_groups, num_nodes, num_ranks = problem
    rng = np.random.default_rng(seed)
    size = load.shape[0], num_replicas
    current = ExpertPlacement.from_physical(  # any table, incomplete ones too
        rng.integers(-1, load.shape[1], size), num_experts=load.shape[1], num_ranks=num_ranks
    )
    placed = place_experts(
        load,
        num_replicas=num_replicas,
        num_ranks=num_ranks,
        num_groups=num_groups,
        num_nodes=num_nodes,
        current=current,
        tolerance=0.1,
    )
    published = rebalance_experts(load, num_replicas, num_groups, num_nodes, num_ranks)
    check_placement(placed, slots_per_rank=num_replicas // num_ranks)
    assert (peak(load, placed) <= peak(load, published) * 1.1 * CLOSE).all()


def exact_peak(load: Load, num_replicas: int, num_ranks: int) -> float:
    """The best peak of one layer by trying every set of ranks for every expert."""
    slots = -(-num_replicas // num_ranks)
    choices = [
        ranks
        for size in range(1, num_ranks + 1)
        for ranks in itertools.combinations(range(num_ranks), size)
    ]
    best = float("inf")
    for chosen in itertools.product(choices, repeat=load.size):
        used = np.zeros(num_ranks)
        by_rank = np.zeros(num_ranks)
        for expert, ranks in enumerate(chosen):
            used[list(ranks)] += 1
            by_rank[list(ranks)] += load[expert] / len(ranks)
        if used.max() <= slots and used.sum() <= num_replicas:
            best = min(best, float(by_rank.max()))
    return best


@pytest.mark.parametrize(("num_replicas", "num_ranks"), [(5, 2), (6, 2), (8, 2), (5, 3), (6, 3)])
def test_close_to_the_exact_optimum_of_small_problems(num_replicas: int, num_ranks: int) -> None:
    load = skewed(3, 3, 5)
    placed = place_experts(load, num_replicas=num_replicas, num_ranks=num_ranks)
    bound = lower_bound(load, num_replicas=num_replicas, num_ranks=num_ranks)
    exact = np.array([exact_peak(row, num_replicas, num_ranks) for row in load])
    assert (bound <= exact * CLOSE).all()
    assert (peak(load, placed) / exact).mean() < 1.02


@pytest.mark.parametrize("num_ranks", [288, 144, 96, 32])
def test_a_hottest_expert_at_thirty_times_the_mean(num_ranks: int) -> None:
    load = with_hottest(4, 4, 256, times_mean=30)
    placed = place_experts(load, num_replicas=288, num_ranks=num_ranks)
    published = rebalance_experts(load, 288, 1, 1, num_ranks)
    unbalanced = ExpertPlacement.contiguous(num_layers=4, num_experts=256, num_ranks=num_ranks)
    before, after = peak_over_mean(load, unbalanced), peak_over_mean(load, placed)
    assert (after < before / 3).all()
    assert (after <= peak_over_mean(load, published) * CLOSE).all()
    if num_ranks in (96, 32):
        assert after.mean() < peak_over_mean(load, published).mean() - 0.005


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("num_experts", [8, 64])
def test_few_ranks_without_redundant_experts(num_experts: int, num_ranks: int) -> None:
    load = skewed(5, 3, num_experts, sigma=0.5)
    placed = place_experts(load, num_replicas=num_experts, num_ranks=num_ranks)
    check_placement(placed, slots_per_rank=-(-num_experts // num_ranks))
    assert (placed.num_replicas == 1).all()
    contiguous = ExpertPlacement.contiguous(
        num_layers=3, num_experts=num_experts, num_ranks=num_ranks
    )
    assert (peak(load, placed) <= peak(load, contiguous)).all()


def test_equal_inputs_give_equal_placements() -> None:
    load = with_hottest(6, 3, 64, times_mean=10)
    tables = [
        place_experts(load, num_replicas=72, num_ranks=8).physical_to_logical for _ in range(2)
    ]
    assert np.array_equal(*tables)


def test_layers_do_not_depend_on_each_other() -> None:
    load = with_hottest(7, 5, 64, times_mean=10)
    together = place_experts(load, num_replicas=72, num_ranks=8)
    for layer_idx in range(5):
        alone = place_experts(load[layer_idx : layer_idx + 1], num_replicas=72, num_ranks=8)
        assert np.array_equal(alone.physical_to_logical[0], together.physical_to_logical[layer_idx])


def test_a_good_placement_is_kept() -> None:
    load = skewed(8, 3, 64)
    placed = place_experts(load, num_replicas=72, num_ranks=8)
    again = place_experts(load, num_replicas=72, num_ranks=8, current=placed)
    assert again is placed


def test_few_experts_move_when_the_load_shifts_a_little() -> None:
    load = skewed(9, 4, 64)
    placed = place_experts(load, num_replicas=72, num_ranks=8)
    shifted = load * np.random.default_rng(9).lognormal(0, 0.2, load.shape)
    moved = place_experts(shifted, num_replicas=72, num_ranks=8, current=placed)
    fresh = place_experts(shifted, num_replicas=72, num_ranks=8)
    assert (peak(shifted, moved) <= peak(shifted, fresh) * 1.01 * CLOSE).all()
    assert num_loads(placed, moved) < num_loads(placed, fresh) / 3


def test_a_lost_rank_and_a_new_rank() -> None:
    load = skewed(10, 2, 8)
    two = place_experts(load, num_replicas=8, num_ranks=2)
    wider = resize(two, num_ranks=3, slots_per_rank=4)
    three = place_experts(load, num_replicas=12, num_ranks=3, current=wider)
    check_placement(three)
    assert (peak(load, three) < peak(load, two)).all()
    lost = resize(three, num_ranks=2, slots_per_rank=4)
    back = place_experts(load, num_replicas=8, num_ranks=2, current=lost)
    check_placement(back, slots_per_rank=4)


def test_groups_stay_on_one_node() -> None:
    load = skewed(11, 3, 32)
    placed = place_experts(load, num_replicas=40, num_ranks=8, num_groups=8, num_nodes=4)
    node_of_slot = np.arange(40) // 10
    for row in placed.physical_to_logical:
        for group in range(8):
            on_group = (row >= 0) & (row // 4 == group)
            assert np.unique(node_of_slot[on_group]).size == 1


def test_a_layer_without_load_keeps_what_it_has() -> None:
    load = skewed(12, 2, 16)
    placed = place_experts(load, num_replicas=20, num_ranks=4)
    load[0] = 0
    moved = place_experts(load, num_replicas=20, num_ranks=4, current=placed)
    assert np.array_equal(moved.physical_to_logical[0], placed.physical_to_logical[0])
    assert peak_over_mean(load, moved)[0] == 1.0


@pytest.mark.parametrize(
    ("load", "arguments", "message"),
    [
        (np.ones((1, 8)), {"num_replicas": 7, "num_ranks": 2}, "at least 8 experts"),
        (np.ones((1, 8)), {"num_replicas": 8, "num_ranks": 0}, "num_ranks=0"),
        (np.ones(8), {"num_replicas": 8, "num_ranks": 2}, "shape"),
        (-np.ones((1, 8)), {"num_replicas": 8, "num_ranks": 2}, "negative"),
        (np.full((1, 8), np.nan), {"num_replicas": 8, "num_ranks": 2}, "finite"),
        (
            np.ones((1, 8)),
            {"num_replicas": 8, "num_ranks": 3, "num_nodes": 2, "num_groups": 2},
            "3 ranks do not divide",
        ),
    ],
)
def test_wrong_arguments_are_refused(load: Load, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_experts(load, **arguments)


def test_a_current_placement_of_another_shape_is_refused() -> None:
    placed = place_experts(np.ones((1, 8)), num_replicas=8, num_ranks=2)
    with pytest.raises(ConfigError, match="resize"):
        place_experts(np.ones((1, 8)), num_replicas=8, num_ranks=4, current=placed)
