"""What `xds status` and the metrics say of a load: how it lies on experts, layers and workers.

Pure functions of a load [L, E] (tokens per expert) and the placement in force.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xdeepserve.eplb import ExpertPlacement, rank_load
from xdeepserve.eplb.rows import F64
from xdeepserve.launch.placement import Placement, expert_placement
from xdeepserve.launch.supervisor.messages import MAX_HOTTEST, ExpertHeat, HotExpert, LayerHeat
from xdeepserve.ops import I32


def expert_heat(
    load: F64,
    placement: Placement,
    *,
    num_migrations: int,
    num_moves: int,
    is_migrating: bool,
) -> ExpertHeat:
    """The whole message.

    Args:
        load: [L, E] tokens of late.
        placement: in force, with at least one expert rank.
        num_migrations, num_moves, is_migrating: see ExpertHeat.
    """
    hottest, share = hottest_expert(load)
    placed = expert_placement(placement, load.shape[1])
    return ExpertHeat(
        num_tokens=int(load.sum()),
        peak_over_mean=peak_over_mean(load, placed),
        hottest=hottest,
        hottest_share=share,
        num_migrations=num_migrations,
        num_moves=num_moves,
        is_migrating=is_migrating,
        placement_epoch=placement.epoch,
        rank_ratios=rank_ratios(load, placed, placement.expert),
        layers=layer_heats(load, placed, placement.expert),
    )


def peak_over_mean(load: F64, placement: ExpertPlacement) -> float:
    """Summed peaks over summed means of the ranks; 1 without load."""
    by_rank = rank_load(load, placement)
    mean = float(by_rank.mean(axis=1).sum())
    return float(by_rank.max(axis=1).sum()) / mean if mean > 0 else 1.0


def hottest_expert(load: F64) -> tuple[tuple[int, int] | None, float]:
    """((layer, expert), share of its layer's tokens), the largest such share."""
    total = load.sum(axis=1, keepdims=True)
    share = np.divide(load, total, out=np.zeros_like(load), where=total > 0)
    layer_idx, expert = np.unravel_index(int(share.argmax()), share.shape)
    hottest = float(share[layer_idx, expert])
    return ((int(layer_idx), int(expert)), hottest) if hottest > 0 else (None, 0.0)


def rank_ratios(load: F64, placement: ExpertPlacement, ranks: Sequence[int]) -> dict[int, float]:
    """Load of each rank over their mean, all layers together; 1 without load.

    Args:
        load: [L, E].
        placement: of the experts on `ranks`, in this order.
        ranks: names of the placement's ranks.
    """
    return _ratios(rank_load(load, placement).sum(axis=0), ranks)


def layer_heats(
    load: F64, placement: ExpertPlacement, ranks: Sequence[int]
) -> tuple[LayerHeat, ...]:
    """The layers that have tokens; arguments as `rank_ratios`."""
    by_rank = rank_load(load, placement)
    held = placement.by_rank()
    return tuple(
        LayerHeat(
            layer_idx=int(layer_idx),
            num_tokens=int(load[layer_idx].sum()),
            rank_ratios=_ratios(by_rank[layer_idx], ranks),
            hottest=_hottest(load[layer_idx], held[layer_idx], ranks),
        )
        for layer_idx in np.flatnonzero(load.sum(axis=1))
    )


def _hottest(load: F64, held: I32, ranks: Sequence[int]) -> tuple[HotExpert, ...]:
    """Of one layer: load [E], experts held [num_ranks, slots]."""
    order = np.argsort(-load, kind="stable")[:MAX_HOTTEST]
    return tuple(
        HotExpert(
            expert=int(expert),
            share=float(load[expert] / load.sum()),
            ranks=tuple(ranks[int(idx)] for idx in np.flatnonzero((held == expert).any(axis=1))),
        )
        for expert in order
        if load[expert] > 0
    )


def _ratios(by_rank: F64, ranks: Sequence[int]) -> dict[int, float]:
    mean = float(by_rank.mean())
    ratios = by_rank / mean if mean > 0 else np.ones_like(by_rank)
    return dict(zip(ranks, ratios.tolist(), strict=True))
