"""How good a placement is: load per rank, its peak over the mean, and a proven lower bound."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from xdeepserve.eplb.placement import ExpertPlacement
from xdeepserve.eplb.rows import F64, replicate
from xdeepserve.errors import ConfigError

_BISECTIONS = 40
_WASTE_PER_HOT = 1 / 3
"""Slots that a hot replica costs beyond its own, at least; see `_slot_bound`."""


def check_load(load: ArrayLike, num_experts: int | None = None) -> F64:
    """`load` as float64 [L, E].

    Raises:
        ConfigError: another shape, or a value that is negative or not finite.
    """
    loads = np.asarray(load, np.float64)
    if loads.ndim != 2 or 0 in loads.shape or num_experts not in (None, loads.shape[1]):
        wanted = "E" if num_experts is None else num_experts
        raise ConfigError(f"expert load of shape {loads.shape} must be [L, {wanted}]")
    if not (np.isfinite(loads).all() and (loads >= 0).all()):
        raise ConfigError("expert load must be finite and not negative")
    return loads


def rank_load(load: ArrayLike, placement: ExpertPlacement) -> F64:
    """[L, num_ranks] load of each rank; the replicas of an expert share its load evenly."""
    loads = check_load(load, placement.num_experts)
    share = loads / np.maximum(placement.num_replicas, 1)
    share = np.concatenate([share, np.zeros((loads.shape[0], 1))], axis=1)  # for empty slots
    by_slot = np.take_along_axis(share, placement.physical_to_logical, 1)
    by_rank = by_slot.reshape(placement.by_rank().shape)
    total: F64 = by_rank.sum(axis=2)
    return total


def peak_over_mean(load: ArrayLike, placement: ExpertPlacement) -> F64:
    """[L] load of the fullest rank over the mean of the ranks; 1 for a layer without load."""
    by_rank = rank_load(load, placement)
    mean = by_rank.mean(axis=1)
    ratio: F64 = np.ones(mean.shape)
    np.divide(by_rank.max(axis=1), mean, out=ratio, where=mean > 0)
    return ratio


def lower_bound(
    load: ArrayLike,
    *,
    num_replicas: int,
    num_ranks: int,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> F64:
    """[L] load that the fullest rank has at least, whatever the placement.

    The largest of: the mean; the largest share when replicas go where they lower it most, never
    more than num_ranks per expert; a count of slots (`_slot_bound`); and, where the nodes divide
    the groups, the node of the heaviest group.

    Args:
        load: [L, E].
        num_replicas: replicas of a layer, at least E; ranks have ceil(num_replicas / num_ranks)
            slots.
        num_ranks: number of ranks.
        num_groups: expert groups that stay on one node, if num_nodes divides them.
        num_nodes: nodes that the ranks are spread over.
    """
    loads = check_load(load)
    counts, _ = replicate(loads, num_replicas, max_per_expert=num_ranks)
    share = (loads / counts).max(axis=1)
    bound: F64 = np.maximum(loads.sum(axis=1) / num_ranks, share)
    if num_groups % num_nodes == 0:
        groups = np.sort(loads.reshape(loads.shape[0], num_groups, -1).sum(axis=2), axis=1)
        others = groups[:, : num_groups // num_nodes - 1].sum(axis=1)
        bound = np.maximum(bound, (groups[:, -1] + others) / (num_ranks // num_nodes))
    by_slots = _slot_bound(loads, share, num_replicas, num_ranks)
    return np.maximum(bound, by_slots)


def _slot_bound(loads: F64, share: F64, num_replicas: int, num_ranks: int) -> F64:
    """[L] the smallest peak B for which the slots suffice.

    A rank holding a share above B - light, where light is the sum of the S - 1 smallest experts,
    exceeds B unless it wastes a slot: leaves it empty, or holds a part of an expert split below
    the size `edge` of the largest of those. Splitting an expert into c such parts takes at least
    c / 3 replicas more than it needs. So an expert with load l costs at least
    min(ceil(l / B) * 4 / 3, ceil(l / (B - light))) slots, and all of them must fit. The argument
    needs B >= light + 2 * edge and B > 2 * light; below that nothing is claimed.
    """
    slots_per_rank = -(-num_replicas // num_ranks)
    lightest = np.sort(loads, axis=1)[:, : slots_per_rank - 1]
    light, edge = lightest.sum(axis=1), lightest.max(axis=1, initial=0.0)
    low, high = share.copy(), np.maximum(share + light, loads.sum(axis=1) / num_ranks)
    applies = (share >= light + 2 * edge) & (share > 2 * light) & (light > 0)
    for _ in range(_BISECTIONS):
        peak = (low + high)[:, None] / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            hot = np.ceil(loads / peak * (1 - 1e-12)) * (1 + _WASTE_PER_HOT)
            cool = np.ceil(loads / (peak - light[:, None]) * (1 - 1e-12))
            fits = np.minimum(hot, cool).sum(axis=1) <= slots_per_rank * num_ranks
        low, high = np.where(fits, low, peak[:, 0]), np.where(fits, peak[:, 0], high)
    return np.where(applies, low, 0.0)
