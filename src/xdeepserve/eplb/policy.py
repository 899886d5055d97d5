"""When to rebalance: a pure decision with two thresholds, confirmation and a cooldown.

A layer waits for its fullest rank, so the expert time of a step goes with the sum of the peaks; the
predicted gain is the fraction of it that the target saves. `start_gain` starts a rebalance, the
lower `layer_gain` picks its layers: those that bring less are not worth their loads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from xdeepserve.eplb.placement import ExpertPlacement
from xdeepserve.eplb.quality import check_load, rank_load
from xdeepserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancePolicy:
    """Thresholds.

    Attributes:
        start_gain: predicted gain from which a rebalance starts.
        layer_gain: gain below which a layer stays as it is; at most start_gain.
        confirmations: checks in a row that must agree before it starts.
        cooldown_s: seconds between two rebalances.
        min_tokens_per_expert: mean count below which the load is mostly noise.
    """

    start_gain: float = 0.05
    layer_gain: float = 0.02
    confirmations: int = 2
    cooldown_s: float = 60.0
    min_tokens_per_expert: float = 32.0

    def __post_init__(self) -> None:
        if not 0 <= self.layer_gain <= self.start_gain < 1:
            raise ConfigError(
                f"layer_gain={self.layer_gain} must be between 0 and start_gain="
                f"{self.start_gain}, and that below 1"
            )
        if self.confirmations < 1 or self.cooldown_s < 0 or self.min_tokens_per_expert <= 0:
            raise ConfigError(
                f"confirmations={self.confirmations} must be at least 1, cooldown_s="
                f"{self.cooldown_s} not negative, min_tokens_per_expert="
                f"{self.min_tokens_per_expert} above 0"
            )


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What a decision remembers: the last rebalance and how often the gain was confirmed since."""

    last_rebalance_s: float | None = None
    num_confirmed: int = 0


@dataclass(frozen=True, slots=True)
class RebalanceDecision:
    """The answer.

    Attributes:
        layers: layers to migrate, largest gain first; empty = do nothing.
        gain: predicted fraction of the summed peaks that the target saves.
        reason: for the log.
        state: to be passed to the next decision.
    """

    layers: tuple[int, ...]
    gain: float
    reason: str
    state: PolicyState


def decide(
    policy: RebalancePolicy,
    state: PolicyState,
    *,
    now_s: float,
    load: ArrayLike,
    current: ExpertPlacement,
    target: ExpertPlacement,
) -> RebalanceDecision:
    """Whether to migrate from current to target now.

    Args:
        policy: the thresholds.
        state: that of the previous decision.
        now_s: monotonic time.
        load: [L, E] counts the target was made for.
        current: the placement in force.
        target: the proposed placement.
    """
    loads = check_load(load, current.num_experts)
    if loads.mean() < policy.min_tokens_per_expert:
        reason = f"too few tokens per expert: {loads.mean():.1f}"
        return RebalanceDecision((), 0.0, reason, replace(state, num_confirmed=0))
    before = rank_load(loads, current).max(axis=1)
    saved = before - rank_load(loads, target).max(axis=1)
    gain = float(saved.sum() / before.sum())
    if gain < policy.start_gain:
        reason = f"gain {gain:.1%} is below {policy.start_gain:.1%}"
        return RebalanceDecision((), gain, reason, replace(state, num_confirmed=0))
    confirmed = replace(state, num_confirmed=min(state.num_confirmed + 1, policy.confirmations))
    if confirmed.num_confirmed < policy.confirmations:
        return RebalanceDecision((), gain, f"gain {gain:.1%} awaits confirmation", confirmed)
    if state.last_rebalance_s is not None and now_s - state.last_rebalance_s < policy.cooldown_s:
        return RebalanceDecision((), gain, "the last rebalance is too recent", confirmed)
    worth = np.nonzero(saved >= policy.layer_gain * np.maximum(before, 1e-300))[0]
    layers = worth[np.argsort(-saved[worth], kind="stable")]
    return RebalanceDecision(
        tuple(layers.tolist()), gain, f"gain {gain:.1%}", PolicyState(last_rebalance_s=now_s)
    )
