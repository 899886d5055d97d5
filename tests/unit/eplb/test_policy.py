"""When to rebalance: thresholds, confirmation, cooldown, choice of layers."""

from __future__ import annotations

import numpy as np
import pytest

from xdeepserve.eplb import (
    ExpertPlacement,
    PolicyState,
    RebalanceDecision,
    RebalancePolicy,
    decide,
)
from xdeepserve.errors import ConfigError

LOAD = np.array([[400, 400, 100, 100], [300, 200, 300, 200], [600, 300, 100, 0]], np.float64)
CURRENT = ExpertPlacement.contiguous(num_layers=3, num_experts=4, num_ranks=2)
TARGET = CURRENT.with_physical([[0, 2, 1, 3], [0, 1, 2, 3], [0, 3, 1, 2]])


def ask(
    *,
    policy: RebalancePolicy | None = None,
    state: PolicyState | None = None,
    now_s: float = 1000.0,
    load: np.ndarray = LOAD,
    target: ExpertPlacement = TARGET,
) -> RebalanceDecision:
    return decide(
        policy or RebalancePolicy(confirmations=1),
        state or PolicyState(),
        now_s=now_s,
        load=load,
        current=CURRENT,
        target=target,
    )


def test_layers_that_gain_are_migrated_largest_gain_first() -> None:
    decision = ask()
    assert decision.layers == (0, 2)
    assert decision.gain == pytest.approx((300 + 0 + 300) / (800 + 500 + 900))
    assert decision.state == PolicyState(last_rebalance_s=1000.0)
    assert ask(load=LOAD * [[1], [1], [2]]).layers == (2, 0)


def test_a_small_gain_is_left_alone_and_resets_the_confirmation() -> None:
    decision = ask(state=PolicyState(num_confirmed=1), target=CURRENT)
    assert decision.layers == ()
    assert decision.state.num_confirmed == 0


def test_a_gain_must_be_confirmed() -> None:
    policy = RebalancePolicy(confirmations=2)
    first = ask(policy=policy)
    assert first.layers == ()
    assert ask(policy=policy, state=first.state).layers == (0, 2)


def test_cooldown_holds_back_and_keeps_the_confirmation() -> None:
    state = PolicyState(last_rebalance_s=950.0)
    early = ask(state=state)
    assert (early.layers, early.state.num_confirmed) == ((), 1)
    assert ask(state=early.state, now_s=1010.0).layers == (0, 2)


def test_noise_is_not_followed() -> None:
    assert ask(load=LOAD / 100).layers == ()
    assert ask(load=LOAD * 0).layers == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"start_gain": 0.01, "layer_gain": 0.02},
        {"start_gain": 1.0},
        {"confirmations": 0},
        {"cooldown_s": -1.0},
        {"min_tokens_per_expert": 0.0},
    ],
)
def test_wrong_thresholds_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        RebalancePolicy(**fields)  # type: ignore[arg-type]
