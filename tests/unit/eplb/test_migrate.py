"""Migration: valid after every tick, bounded, abortable, and it arrives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.eplb.loads import skewed, with_hottest
from xdeepserve.eplb import (
    ExpertPlacement,
    MigrationTick,
    Phase,
    check_placement,
    migrate,
    num_loads,
    place_experts,
    resize,
)
from xdeepserve.errors import ConfigError, IntegrityError


class Ranks:
    """What the ranks of a service hold: a model that refuses to use what is not there."""

    def __init__(self, placement: ExpertPlacement) -> None:
        self.in_force = placement
        self.held = experts_of(placement)
        self.peak_staged = 0

    def apply(self, tick: MigrationTick) -> None:
        if tick.phase is Phase.LOAD:
            for move in tick.moves:
                key = (move.layer_idx, move.to_rank, move.expert)
                assert key not in self.held
                self.held.add(key)
        elif tick.phase is Phase.FLIP:
            self.in_force = tick.placement
        else:
            for move in tick.moves:
                self.held.remove((move.layer_idx, move.to_rank, move.replaced))
        assert tick.placement is self.in_force
        assert experts_of(self.in_force) <= self.held
        self.peak_staged = max(self.peak_staged, self.staged())

    def staged(self) -> int:
        """Most experts a rank holds beyond what its slots may hold."""
        beyond = Counter(rank for _, rank, _ in self.held - experts_of(self.in_force))
        return max(beyond.values(), default=0)


def experts_of(placement: ExpertPlacement) -> set[tuple[int, int, int]]:
    """(layer, rank, expert) of everything placed."""
    return {tuple(map(int, key)) for key in np.argwhere(placement.replicas_on_ranks() > 0)}  # type: ignore[misc]


def same_ranks(one: ExpertPlacement, other: ExpertPlacement) -> bool:
    return np.array_equal(one.replicas_on_ranks(), other.replicas_on_ranks())


def placement(table: list[list[int]], *, num_experts: int, num_ranks: int) -> ExpertPlacement:
    return ExpertPlacement.from_physical(table, num_experts=num_experts, num_ranks=num_ranks)


@st.composite
def two_placements(draw: st.DrawFn) -> tuple[ExpertPlacement, ExpertPlacement]:
    """Two random valid placements of one shape, with empty slots and doubles."""
    num_ranks = draw(st.integers(1, 4))
    num_experts = draw(st.integers(1, 8))
    slots = -(-num_experts // num_ranks) + draw(st.integers(0, 2))
    num_layers = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def one() -> ExpertPlacement:
        table = []
        for _ in range(num_layers):
            spare = rng.integers(-1, num_experts, slots * num_ranks - num_experts)
            table.append(rng.permutation(np.concatenate([np.arange(num_experts), spare])))
        return ExpertPlacement.from_physical(table, num_experts=num_experts, num_ranks=num_ranks)

    return one(), one()


@settings(max_examples=200, deadline=None)
@given(two_placements(), st.integers(2, 5), st.integers(1, 3))
def test_every_tick_leaves_a_valid_placement(
    ends: tuple[ExpertPlacement, ExpertPlacement], max_moves: int, max_staged: int
) -> None:
    current, target = ends
    ranks = Ranks(current)
    epochs = 0
    ticks = migrate(current, target, max_moves=max_moves, max_staged_per_rank=max_staged)
    for tick in ticks:
        ranks.apply(tick)
        check_placement(tick.placement, slots_per_rank=current.slots_per_rank)
        assert len(tick.moves) <= max_moves
        epochs += tick.phase is Phase.FLIP
        assert ranks.held >= experts_of(tick.placement), "it may be abandoned here"
    assert ranks.held == experts_of(target)
    assert same_ranks(ranks.in_force, target)
    assert ranks.peak_staged <= max_staged
    assert (epochs == 0) == same_ranks(current, target)


def run(ticks: Iterable[MigrationTick], ranks: Ranks) -> list[MigrationTick]:
    done = []
    for tick in ticks:
        ranks.apply(tick)
        done.append(tick)
    return done


def test_a_replica_is_loaded_routed_and_only_then_the_old_one_dropped() -> None:
    current = placement([[0, 1, 2, 0]], num_experts=3, num_ranks=2)
    target = placement([[0, 1, 2, 1]], num_experts=3, num_ranks=2)
    load, flip, drop = migrate(current, target)
    assert [load.phase, flip.phase, drop.phase] == [Phase.LOAD, Phase.FLIP, Phase.DROP]
    (move,) = load.moves
    assert (move.layer_idx, move.expert, move.from_rank, move.to_rank) == (0, 1, 0, 1)
    assert (move.slot, move.replaced) == (3, 0)
    assert load.placement is current
    assert flip.placement.physical_to_logical.tolist() == [[0, 1, 2, 1]]


def test_a_cycle_flips_as_a_whole_if_it_fits() -> None:
    current = placement([[0, 1, 2, 3]], num_experts=4, num_ranks=4)
    target = placement([[1, 2, 3, 0]], num_experts=4, num_ranks=4)
    whole = list(migrate(current, target, max_moves=4))
    assert [len(tick.moves) for tick in whole] == [4, 4, 4]
    chain = run(migrate(current, target, max_moves=2), Ranks(current))
    assert [len(tick.moves) for tick in chain] == [2] * 9
    assert np.array_equal(chain[-1].placement.physical_to_logical, target.physical_to_logical)


def test_a_lost_expert_is_restored_before_anything_else() -> None:
    whole = placement([[0, 1, 2, 0, 3, 1]], num_experts=4, num_ranks=3)
    current = resize(resize(whole, num_ranks=2, slots_per_rank=2), num_ranks=3, slots_per_rank=2)
    target = placement([[1, 0, 2, 3, 1, 2]], num_experts=4, num_ranks=3)
    ticks = list(migrate(current, target, max_moves=2))
    assert (ticks[0].phase, ticks[0].moves[0].expert) == (Phase.LOAD, 3)
    assert ticks[0].moves[0].from_rank == -1
    check_placement(ticks[1].placement)
    assert same_ranks(ticks[-1].placement, target)


def test_scaling_up_and_down() -> None:
    load = skewed(1, 3, 8)
    small = place_experts(load, num_replicas=8, num_ranks=2)
    start = resize(small, num_ranks=3, slots_per_rank=4)
    big = place_experts(load, num_replicas=12, num_ranks=3, current=start)
    up = run(migrate(start, big), Ranks(start))
    end = resize(small, num_ranks=3, slots_per_rank=4)
    down = run(migrate(up[-1].placement, end), Ranks(up[-1].placement))
    assert not down[-1].placement.replicas_on_ranks()[:, 2].any()
    for tick in up + down:
        check_placement(tick.placement)


def test_only_the_layers_asked_for_move_in_their_order() -> None:
    current = place_experts(skewed(2, 4, 16), num_replicas=20, num_ranks=4)
    target = place_experts(skewed(3, 4, 16), num_replicas=20, num_ranks=4)
    ticks = list(migrate(current, target, layers=[2, 0]))
    order = [move.layer_idx for tick in ticks if tick.phase is Phase.FLIP for move in tick.moves]
    assert order == sorted(order, reverse=True)
    assert set(order) == {2, 0}
    changed = ticks[-1].placement.replicas_on_ranks() != current.replicas_on_ranks()
    assert changed.any(axis=(1, 2)).tolist() == [True, False, True, False]


def test_the_real_shape_needs_few_more_loads_than_the_least() -> None:
    before, after = (with_hottest(seed, 4, 256, times_mean=30) for seed in (4, 5))
    current = place_experts(before, num_replicas=288, num_ranks=32)
    target = place_experts(after, num_replicas=288, num_ranks=32, current=current)
    ticks = run(migrate(current, target, max_moves=8), Ranks(current))
    num_loaded = sum(len(tick.moves) for tick in ticks if tick.phase is Phase.LOAD)
    assert num_loads(current, target) <= num_loaded <= 1.1 * num_loads(current, target)
    assert same_ranks(ticks[-1].placement, target)


def test_nothing_to_do_is_no_tick() -> None:
    current = placement([[0, 1, 2, 3]], num_experts=4, num_ranks=2)
    reordered = placement([[1, 0, 3, 2]], num_experts=4, num_ranks=2)
    assert list(migrate(current, reordered)) == []


def test_impossible_wishes_are_refused_at_once() -> None:
    current = placement([[0, 1]], num_experts=2, num_ranks=2)
    with pytest.raises(IntegrityError, match="expert 1 has no replica"):
        migrate(current, placement([[0, 0]], num_experts=2, num_ranks=2))
    with pytest.raises(ConfigError, match="max_moves=1"):
        migrate(current, current, max_moves=1)
    with pytest.raises(ConfigError, match="differ in shape"):
        migrate(current, placement([[0, 1]], num_experts=2, num_ranks=1))
