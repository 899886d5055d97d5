"""When to rebalance: a pure decision with evidence of two windows, two thresholds, a cooldown.

A layer waits for its fullest rank, so the expert time of a step goes with the sum of the peaks; the
predicted gain is the fraction of it that the target saves. `start_gain` starts a rebalance, the
lower `layer_gain` picks its layers: those that bring less are not worth their loads. Both must hold
in each window by itself: what one text or one burst wanted is gone in the next window. A layer with
few tokens in a window is no evidence, and a service with few tokens has nothing to gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from xdeepserve.eplb.placement import ExpertPlacement
from xdeepserve.eplb.quality import check_load, rank_load
from xdeepserve.eplb.rows import F64
from xdeepserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancePolicy:
    """Thresholds.

    Attributes:
        start_gain: predicted gain from which a rebalance starts.
        layer_gain: gain below which a layer stays as it is; at most start_gain.
        num_windows: latest windows that must each agree.
        cooldown_s: seconds between two rebalances.
        min_tokens_per_expert: mean count of a layer's experts in a window below which the layer
            stays as it is. A rank with n experts then has a noise of 1 / sqrt(512 n), at most 4%.
    """

    start_gain: float = 0.05
    layer_gain: float = 0.02
    num_windows: int = 2
    cooldown_s: float = 60.0
    min_tokens_per_expert: float = 512.0

    def __post_init__(self) -> None:
        if not 0 <= self.layer_gain <= self.start_gain < 1:
            raise ConfigError(
                f"layer_gain={self.layer_gain} must be between 0 and start_gain="
                f"{self.start_gain}, and that below 1"
            )
        if self.num_windows < 1 or self.cooldown_s < 0 or self.min_tokens_per_expert <= 0:
            raise ConfigError(
                f"num_windows={self.num_windows} must be at least 1, cooldown_s="
                f"{self.cooldown_s} not negative, min_tokens_per_expert="
                f"{self.min_tokens_per_expert} above 0"
            )


@dataclass(frozen=True, slots=True)
class RebalanceDecision:
    """The answer.

    Attributes:
        layers: layers to migrate, largest gain first; empty = do nothing.
        gain: predicted fraction of the summed peaks that the target saves in the worst window.
        reason: for the log.
    """

    layers: tuple[int, ...]
    gain: float
    reason: str


def decide(
    policy: RebalancePolicy,
    *,
    since_last_s: float,
    windows: Sequence[ArrayLike],
    current: ExpertPlacement,
    target: ExpertPlacement,
) -> RebalanceDecision:
    """Whether to migrate from current to target now.

    Args:
        policy: the thresholds.
        since_last_s: seconds since the last rebalance; inf = there was none.
        windows: [L, E] counts of each window that is over, the latest last.
        current: the placement in force.
        target: the proposed placement.

    Source:
        Ours.
    """
    if len(windows) < policy.num_windows:
        return RebalanceDecision((), 0.0, f"only {len(windows)} windows are over")
    loads = [check_load(load, current.num_experts) for load in windows[-policy.num_windows :]]
    fewest = np.min([load.mean(axis=1) for load in loads], axis=0)
    enough = fewest >= policy.min_tokens_per_expert
    if not enough.any():
        reason = f"too few tokens per expert: {fewest.max():.1f} in a window"
        return RebalanceDecision((), 0.0, reason)
    before = np.array([_peaks(load, current) for load in loads])[:, enough]  # [windows, layers]
    saved = before - np.array([_peaks(load, target) for load in loads])[:, enough]
    gain = float((saved.sum(axis=1) / before.sum(axis=1)).min())
    if gain < policy.start_gain:
        return RebalanceDecision((), gain, f"gain {gain:.1%} is below {policy.start_gain:.1%}")
    if since_last_s < policy.cooldown_s:
        return RebalanceDecision((), gain, "the last rebalance is too recent")
    worth = (saved >= policy.layer_gain * before).all(axis=0)
    least = saved.min(axis=0)
    order = np.argsort(-least[worth], kind="stable")
    layers = np.flatnonzero(enough)[worth][order]
    return RebalanceDecision(tuple(layers.tolist()), gain, f"gain {gain:.1%}")


def _peaks(load: F64, placement: ExpertPlacement) -> F64:
    """[L] load of each layer's fullest rank."""
    peaks: F64 = rank_load(load, placement).max(axis=1)
    return peaks
