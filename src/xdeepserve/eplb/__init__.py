"""EPLB: where the experts live. Load statistics, placement, when to migrate, and how.

Pure but for `ExpertLoadStats`: this room counts and plans; others load experts and swap routing.
"""

from __future__ import annotations

from xdeepserve.eplb.hold import hold_ranks
from xdeepserve.eplb.load_stats import ExpertLoadReport, ExpertLoadStats
from xdeepserve.eplb.migrate import ExpertMove, MigrationTick, Phase, migrate
from xdeepserve.eplb.place import place_experts
from xdeepserve.eplb.placement import (
    EMPTY,
    ExpertPlacement,
    check_placement,
    num_loads,
    resize,
)
from xdeepserve.eplb.policy import RebalanceDecision, RebalancePolicy, decide
from xdeepserve.eplb.published import rebalance_experts
from xdeepserve.eplb.quality import lower_bound, peak_over_mean, rank_load

__all__ = [
    "EMPTY",
    "ExpertLoadReport",
    "ExpertLoadStats",
    "ExpertMove",
    "ExpertPlacement",
    "MigrationTick",
    "Phase",
    "RebalanceDecision",
    "RebalancePolicy",
    "check_placement",
    "decide",
    "hold_ranks",
    "lower_bound",
    "migrate",
    "num_loads",
    "peak_over_mean",
    "place_experts",
    "rank_load",
    "rebalance_experts",
    "resize",
]
