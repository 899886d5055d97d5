"""place_experts: choose replicas and ranks for the experts of every layer.

    load -> group order -> replicate -> fill -> improve -> fresh --+   per layer: of those
    current -> trim -> fill -> improve (as far as needed) ---------+-> good enough, the one with
    current, as it is ---------------------------------------------+   the fewest expert loads

"Good enough" is within `tolerance` of the best one found, the published algorithm's included. Pure
and deterministic; all layers are solved together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from xdeepserve.eplb.improve import improve
from xdeepserve.eplb.placement import (
    EMPTY,
    ExpertPlacement,
    align_slots,
    loads_per_layer,
    require_same_shape,
)
from xdeepserve.eplb.published import expand_groups, rebalance_experts
from xdeepserve.eplb.quality import check_load, lower_bound, rank_load
from xdeepserve.eplb.rows import F64, I64, Bool, fill, rank_loads, replicate, shares, trim
from xdeepserve.errors import ConfigError
from xdeepserve.ops import I32

_CLOSE = 1e-3
"""Distance from the lower bound at which the search stops, as a fraction."""
_ROUNDING = 1e-9
_MAX_ROUNDS = 64
_SMALL = 128
"""Up to this many slots a layer, several numbers of replicas are tried as starts of the search."""
_START_FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True, slots=True)
class _Shape:
    """The numbers of one problem; a row is one layer on one node."""

    num_layers: int
    num_experts: int
    num_replicas: int
    num_ranks: int
    num_groups: int
    num_nodes: int

    @property
    def ranks_per_row(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def slots_per_rank(self) -> int:
        return -(-self.num_replicas // self.num_ranks)

    @property
    def replicas_per_row(self) -> int:
        return self.num_replicas // self.num_nodes

    @property
    def experts_per_row(self) -> int:
        return self.num_experts // self.num_nodes


def place_experts(
    load: ArrayLike,
    *,
    num_replicas: int,
    num_ranks: int,
    num_groups: int = 1,
    num_nodes: int = 1,
    current: ExpertPlacement | None = None,
    tolerance: float = 0.01,
) -> ExpertPlacement:
    """Replicate and place experts so that the fullest rank has little more than the mean.

    Args:
        load: [L, E] tokens per logical expert.
        num_replicas: most replicas of a layer, at least E; a rank has ceil(num_replicas /
            num_ranks) slots, and some stay empty where the numbers do not divide.
        num_ranks: number of ranks.
        num_groups: expert groups; where the nodes divide them, a group stays on one node.
        num_nodes: nodes that the ranks are spread over.
        current: what is in place (see `resize` for another shape); None = nothing.
        tolerance: how much better, as a fraction, a peak must be to be worth more expert loads;
            matters with `current` only.

    Returns:
        A placement with every expert. Its peak is at most the published algorithm's, layer by
        layer, times 1 + tolerance if `current` is given. What stays on a rank keeps its slot.

    Raises:
        ConfigError: the numbers do not fit together, or the load is not valid.

    Source:
        Ours: the published replication, packing that may leave slots empty, local search.
    """
    loads = check_load(load)
    shape = _check_shape(loads, num_replicas, num_ranks, num_groups, num_nodes)
    expert_of = _group_order(loads, shape)
    fresh = _fresh(loads, expert_of, shape)
    limit, best = _good_enough(loads, fresh, shape, tolerance if current is not None else 0.0)
    if current is None:
        return best
    require_same_shape(current, best)
    return _stable(loads, current, best, limit, expert_of, shape)


def _check_shape(
    loads: F64, num_replicas: int, num_ranks: int, num_groups: int, num_nodes: int
) -> _Shape:
    num_layers, num_experts = loads.shape
    if min(num_ranks, num_groups, num_nodes) < 1 or num_replicas < num_experts:
        raise ConfigError(
            f"num_replicas={num_replicas} must be at least {num_experts} experts; num_ranks="
            f"{num_ranks}, num_groups={num_groups} and num_nodes={num_nodes} at least 1"
        )
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    for name, value, divisor in (
        ("experts", num_experts, num_groups),
        ("ranks", num_ranks, num_nodes),
        ("replicas", num_replicas, num_nodes),
    ):
        if value % divisor:
            raise ConfigError(f"{value} {name} do not divide among {divisor} groups or nodes")
    return _Shape(num_layers, num_experts, num_replicas, num_ranks, num_groups, num_nodes)


def _group_order(loads: F64, shape: _Shape) -> I64:
    """[L * nodes, E / nodes]: the experts of each row; groups are spread evenly over nodes."""
    if shape.num_nodes == 1:
        return np.broadcast_to(np.arange(shape.num_experts), loads.shape)
    per_group = loads.reshape(shape.num_layers, shape.num_groups, -1).sum(axis=2)
    ones = np.ones(per_group.shape, np.int64)
    empty = np.full(
        (shape.num_layers, shape.num_nodes, shape.num_groups // shape.num_nodes), shape.num_groups
    )
    groups = fill(empty, ones, shares(per_group, ones))
    goal = per_group.sum(axis=1) / shape.num_nodes * (1 + _CLOSE)
    groups = improve(
        groups, per_group, goal=goal, num_replicas=shape.num_groups, max_rounds=_MAX_ROUNDS
    )
    return _rows_of_groups(np.sort(groups, axis=2), shape)


def _rows_of_groups(groups: I64, shape: _Shape) -> I64:
    order = groups.reshape(shape.num_layers, shape.num_groups)
    experts = expand_groups(order, shape.num_experts // shape.num_groups)
    return experts.reshape(-1, shape.experts_per_row)


def _row_load(loads: F64, expert_of: I64, shape: _Shape) -> F64:
    return np.take_along_axis(np.repeat(loads, shape.num_nodes, axis=0), expert_of, 1)


def _to_table(slots: I64, expert_of: I64, shape: _Shape) -> I64:
    """[L, P] expert ids of row-local slots [L * nodes, R, S]."""
    padded = np.concatenate([expert_of, np.full((len(expert_of), 1), EMPTY)], axis=1)
    table = padded[np.arange(len(slots))[:, None, None], slots]
    return table.reshape(shape.num_layers, -1)


def _to_rows(table: I32, expert_of: I64, shape: _Shape) -> I64:
    """Row-local slots of a table [L, P]; experts of other nodes count as empty."""
    local = np.full((len(expert_of), shape.num_experts + 1), shape.experts_per_row)
    np.put_along_axis(local, expert_of, np.arange(shape.experts_per_row)[None], axis=1)
    by_row = table.reshape(len(expert_of), shape.ranks_per_row, -1)
    return local[np.arange(len(expert_of))[:, None, None], by_row]


def _per_layer(row_peak: F64, shape: _Shape) -> F64:
    peak: F64 = row_peak.reshape(shape.num_layers, shape.num_nodes).max(axis=1)
    return peak


def _fresh(loads: F64, expert_of: I64, shape: _Shape) -> ExpertPlacement:
    """The best placement found from nothing."""
    row_load = _row_load(loads, expert_of, shape)
    replicas, ranks = shape.replicas_per_row, shape.ranks_per_row
    bound = lower_bound(row_load, num_replicas=replicas, num_ranks=ranks)
    goal = np.repeat(_per_layer(bound, shape), shape.num_nodes) * (1 + _CLOSE)
    empty = np.full((len(row_load), ranks, shape.slots_per_rank), shape.experts_per_row)
    spare = replicas - shape.experts_per_row
    fractions = _START_FRACTIONS if shape.num_replicas <= _SMALL else (1.0,)
    starts = sorted({shape.experts_per_row + round(spare * f) for f in fractions}, reverse=True)
    filled = []
    for start in starts:
        counts, _ = replicate(row_load, start, max_per_expert=ranks)
        filled.append(fill(empty, counts, shares(row_load, counts)))
    many = np.tile(row_load, (len(starts), 1))
    slots = improve(
        np.concatenate(filled),
        many,
        goal=np.tile(goal, len(starts)),
        num_replicas=replicas,
        max_rounds=_MAX_ROUNDS,
    )
    peak = rank_loads(slots, many).max(axis=1).reshape(len(starts), -1)
    best = slots.reshape(len(starts), *empty.shape)[
        np.argmin(np.where(peak <= goal, 0.0, peak), axis=0), np.arange(len(row_load))
    ]
    return _placement(_to_table(best, expert_of, shape), shape)


def _placement(table: I64, shape: _Shape) -> ExpertPlacement:
    return ExpertPlacement.from_physical(
        table, num_experts=shape.num_experts, num_ranks=shape.num_ranks
    )


def _good_enough(
    loads: F64, fresh: ExpertPlacement, shape: _Shape, tolerance: float
) -> tuple[F64, ExpertPlacement]:
    """[L] the peak to reach, and a placement that reaches it: fresh or the published one."""
    peak = rank_load(loads, fresh).max(axis=1)
    if shape.num_replicas % shape.num_ranks:
        return peak * (1 + tolerance), fresh
    published = rebalance_experts(
        loads, shape.num_replicas, shape.num_groups, shape.num_nodes, shape.num_ranks
    )
    other = rank_load(loads, published).max(axis=1)
    take = other < peak * (1 - _ROUNDING)
    best = merge_layers(fresh, published, take)
    return np.where(take, other, peak) * (1 + tolerance), best


def _stable(
    loads: F64,
    current: ExpertPlacement,
    best: ExpertPlacement,
    limit: F64,
    expert_of: I64,
    shape: _Shape,
) -> ExpertPlacement:
    """Layer by layer: current if it is good enough, else current repaired, else best."""
    limit = limit * (1 + _ROUNDING)
    complete = (current.num_replicas > 0).all(axis=1)
    within_budget = current.num_replicas.sum(axis=1) <= shape.num_replicas
    fits = rank_load(loads, current).max(axis=1) <= limit
    keep = complete & within_budget & fits & _groups_intact(current, shape)
    if keep.all():
        return current
    expert_of = _current_groups(current, expert_of, shape)
    repaired = _repair(loads, current, limit, expert_of, shape)
    best = _relabel(best, current, shape)
    repair = rank_load(loads, repaired).max(axis=1) <= limit
    repair &= loads_per_layer(current, repaired) <= loads_per_layer(current, best)
    chosen = merge_layers(merge_layers(best, repaired, repair), current, keep)
    return align_slots(chosen, current)


def _replicas_on_nodes(current: ExpertPlacement, shape: _Shape) -> I64:
    """[L, nodes, groups] replicas of a group's experts on each node."""
    by_rank = current.replicas_on_ranks().astype(np.int64)
    by_node = by_rank.reshape(
        shape.num_layers, shape.num_nodes, shape.ranks_per_row, shape.num_groups, -1
    )
    total: I64 = by_node.sum(axis=(2, 4))
    return total


def _groups_intact(current: ExpertPlacement, shape: _Shape) -> Bool:
    """[L] whether each group's replicas are on one node."""
    spread = np.count_nonzero(_replicas_on_nodes(current, shape), axis=1)
    intact: Bool = (spread <= 1).all(axis=1)
    return intact


def _current_groups(current: ExpertPlacement, expert_of: I64, shape: _Shape) -> I64:
    """Experts per row as `current` has them, where it spreads the groups evenly over nodes."""
    if shape.num_nodes == 1:
        return expert_of
    node = np.argmax(_replicas_on_nodes(current, shape), axis=1)  # [L, G]
    order = np.argsort(node, axis=1, kind="stable")
    even = np.repeat(np.arange(shape.num_nodes), shape.num_groups // shape.num_nodes)
    fits = (np.sort(node, axis=1) == even).all(axis=1)
    rows = _rows_of_groups(order, shape)
    return np.where(np.repeat(fits, shape.num_nodes)[:, None], rows, expert_of)


def _repair(
    loads: F64, current: ExpertPlacement, limit: F64, expert_of: I64, shape: _Shape
) -> ExpertPlacement:
    """`current` with replica counts for this load, searched only until the limit is reached."""
    row_load = _row_load(loads, expert_of, shape)
    counts, _ = replicate(row_load, shape.replicas_per_row, max_per_expert=shape.ranks_per_row)
    share = shares(row_load, counts)
    slots = trim(_to_rows(current.physical_to_logical, expert_of, shape), counts, share)
    slots = fill(slots, counts, share)
    goal = np.repeat(limit, shape.num_nodes)
    slots = improve(
        slots,
        row_load,
        goal=goal,
        num_replicas=shape.replicas_per_row,
        max_rounds=_MAX_ROUNDS,
    )
    return _placement(_to_table(slots, expert_of, shape), shape)


def _relabel(target: ExpertPlacement, current: ExpertPlacement, shape: _Shape) -> ExpertPlacement:
    """`target` with the ranks of a node renumbered to hold much of what they hold in `current`."""
    per_row = (shape.num_layers * shape.num_nodes, shape.ranks_per_row, -1)
    new = target.replicas_on_ranks().reshape(per_row).astype(np.float32)
    old = current.replicas_on_ranks().reshape(per_row).astype(np.float32)
    overlap = np.minimum(new, 1) @ np.minimum(old, 1).transpose(0, 2, 1)  # [B, new, old]
    rows = np.arange(per_row[0])
    source = np.zeros(per_row[:2], np.int64)  # new rank that goes to each old one
    for _ in range(shape.ranks_per_row):
        best = np.argmax(overlap.reshape(per_row[0], -1), axis=1)
        taken, place = np.divmod(best, shape.ranks_per_row)
        source[rows, place] = taken
        overlap[rows, taken] = -1
        overlap[rows, :, place] = -1
    slots = target.physical_to_logical.reshape(per_row)
    moved = np.take_along_axis(slots, source[:, :, None], 1)
    return target.with_physical(moved.reshape(target.physical_to_logical.shape))


def merge_layers(base: ExpertPlacement, other: ExpertPlacement, take: ArrayLike) -> ExpertPlacement:
    """`base` with the layers of `other` where take [L] is true."""
    chosen = np.asarray(take, np.bool_)[:, None]
    return base.with_physical(np.where(chosen, other.physical_to_logical, base.physical_to_logical))
