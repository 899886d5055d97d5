"""Redundant experts on top of a fixed base, by a cost model over time windows.

The model of the xDeepServe paper: in each window a layer takes as long as its hottest replica, so a
layer costs the sum over windows of that maximum. Base experts never move; only the redundant slots
change. `place` balances better, this moves less and looks at bursts instead of the average.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from xdeepserve.eplb.placement import ExpertPlacement, resize
from xdeepserve.eplb.rows import F64, I64, fill, shares
from xdeepserve.errors import ConfigError

_TIE = 1e-9
"""Weight, in tokens, of an expert's total share where no single replica lowers the cost."""


def replicate_by_cost(
    window_load: ArrayLike, num_replicas: int, *, max_per_expert: int | None = None
) -> I64:
    """Add, one at a time, the replica that lowers the summed per-window maximum most.

    Args:
        window_load: [W, L, E] tokens per window, layer and expert.
        num_replicas: replicas of a layer, at least E.
        max_per_expert: limit per expert; with it a layer may end below num_replicas.

    Returns:
        counts [L, E].

    Source:
        xDeepServe paper, EPLB: greedy selection with simulated even split.
    """
    loads = np.asarray(window_load, np.float64)
    if loads.ndim != 3:
        raise ConfigError(f"window_load of shape {loads.shape} must be [W, L, E]")
    _, num_layers, num_experts = loads.shape
    counts = np.ones((num_layers, num_experts), np.int64)
    limit = num_replicas if max_per_expert is None else max_per_expert
    layers = np.arange(num_layers)
    for _ in range(num_replicas - num_experts):
        saved = np.where(counts < limit, _saved_by_one_more(loads, counts), -1.0)
        chosen = np.argmax(saved, axis=1)
        counts[layers, chosen] += counts[layers, chosen] < limit
    return counts


def _saved_by_one_more(loads: F64, counts: I64) -> F64:
    """[L, E] fall of a layer's cost if an expert gets one more replica; ties by total share."""
    share = loads / counts
    hottest = np.argmax(share, axis=2)  # [W, L]
    peak = share.max(axis=2)
    others = share.copy()
    np.put_along_axis(others, hottest[:, :, None], 0.0, axis=2)
    count = np.take_along_axis(counts, hottest.T, 1).T
    fall = peak - np.maximum(others.max(axis=2), peak * count / (count + 1))
    saved = np.zeros(counts.shape)
    np.add.at(saved, (np.arange(len(counts)), hottest), fall)
    total = share.sum(axis=0)
    saved += total / max(float(total.max()), 1.0) * _TIE
    return saved


def place_redundant_experts(
    window_load: ArrayLike, *, num_replicas: int, num_ranks: int
) -> ExpertPlacement:
    """Base experts in order, redundant ones hottest first on the least loaded rank with room.

    Args:
        window_load: [W, L, E].
        num_replicas: replicas of a layer; ranks have ceil(num_replicas / num_ranks) slots.
        num_ranks: number of ranks.

    Raises:
        ConfigError: fewer replicas than experts.
    """
    loads = np.asarray(window_load, np.float64)
    counts = replicate_by_cost(loads, num_replicas, max_per_expert=num_ranks)
    _, num_layers, num_experts = loads.shape
    if num_replicas < num_experts:
        raise ConfigError(f"num_replicas={num_replicas} must be at least {num_experts} experts")
    base = ExpertPlacement.contiguous(
        num_layers=num_layers, num_experts=num_experts, num_ranks=num_ranks
    )
    base = resize(base, num_ranks=num_ranks, slots_per_rank=-(-num_replicas // num_ranks))
    slots = base.by_rank().astype(np.int64)
    slots = np.where(slots < 0, num_experts, slots)
    slots = fill(slots, counts, shares(loads.sum(axis=0), counts))
    table = np.where(slots == num_experts, -1, slots).reshape(num_layers, -1)
    return base.with_physical(table)
