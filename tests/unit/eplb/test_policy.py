"""When to rebalance: thresholds, evidence of two windows, cooldown, choice of layers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from xdeepserve.eplb import (
    ExpertPlacement,
    RebalanceDecision,
    RebalancePolicy,
    decide,
)
from xdeepserve.errors import ConfigError

LOAD = np.array([[400, 400, 100, 100], [300, 200, 300, 200], [600, 300, 100, 0]], np.float64)
CURRENT = ExpertPlacement.contiguous(num_layers=3, num_experts=4, num_ranks=2)
TARGET = CURRENT.with_physical([[0, 2, 1, 3], [0, 1, 2, 3], [0, 3, 1, 2]])


def ask(
    *windows: np.ndarray,
    policy: RebalancePolicy | None = None,
    since_last_s: float = math.inf,
    target: ExpertPlacement = TARGET,
) -> RebalanceDecision:
    return decide(
        policy or RebalancePolicy(min_tokens_per_expert=32.0),
        since_last_s=since_last_s,
        windows=windows or (LOAD, LOAD),
        current=CURRENT,
        target=target,
    )


def test_layers_that_gain_are_migrated_largest_gain_first() -> None:
    decision = ask()
    assert decision.layers == (0, 2)
    assert decision.gain == pytest.approx((300 + 0 + 300) / (800 + 500 + 900))
    assert ask(*[LOAD * [[1], [1], [2]]] * 2).layers == (2, 0)


def test_a_small_gain_is_left_alone() -> None:
    assert ask(target=CURRENT).layers == ()


def test_one_window_is_not_enough() -> None:
    assert ask(LOAD).layers == ()
    one = RebalancePolicy(num_windows=1, min_tokens_per_expert=32.0)
    assert ask(LOAD, policy=one).layers == (0, 2)


def test_the_skew_must_be_the_same_one_in_both_windows() -> None:
    against = LOAD[:, [0, 2, 1, 3]]
    for other in (against, np.full_like(LOAD, 250)):
        assert ask(other, LOAD).layers == ()
        assert ask(LOAD, other).layers == ()
        assert ask(other, LOAD, LOAD).layers == (0, 2)


def test_a_layer_that_gains_in_one_window_only_stays() -> None:
    other = LOAD.copy()
    other[2] = [100, 300, 100, 600]
    decision = ask(LOAD, other)
    assert decision.layers == (0,)
    before, saved = 800 + 500 + 700, 300 + 0 + 0
    assert decision.gain == pytest.approx(saved / before)


def test_a_layer_with_few_tokens_stays_whatever_the_others_have() -> None:
    few = LOAD * [[1], [1], [0.1]]
    decision = ask(LOAD, few)
    assert decision.layers == (0,)
    assert decision.gain == pytest.approx(300 / (800 + 500))


def test_a_quiet_window_is_no_evidence() -> None:
    assert ask(LOAD / 100, LOAD).layers == ()
    assert ask(LOAD, LOAD / 100).layers == ()
    assert ask(LOAD * 0, LOAD * 0).layers == ()


def test_cooldown_holds_back() -> None:
    early = ask(since_last_s=50.0)
    assert (early.layers, early.reason) == ((), "the last rebalance is too recent")
    assert ask(since_last_s=60.0).layers == (0, 2)


def test_a_single_stream_is_too_little_by_default() -> None:
    """Ten seconds of a stream of 100 tokens/s, top 2 of 8 experts, all on one worker."""
    placed = ExpertPlacement.contiguous(num_layers=1, num_experts=8, num_ranks=2)
    better = placed.with_physical([[0, 2, 4, 6, 1, 3, 5, 7]])
    stream = np.array([[1000, 1000, 0, 0, 0, 0, 0, 0]])
    arguments = {"since_last_s": math.inf, "current": placed, "target": better}
    assert decide(RebalancePolicy(), windows=[stream] * 2, **arguments).layers == ()
    assert decide(RebalancePolicy(), windows=[stream * 32] * 2, **arguments).layers == (0,)


@pytest.mark.parametrize(
    "fields",
    [
        {"start_gain": 0.01, "layer_gain": 0.02},
        {"start_gain": 1.0},
        {"num_windows": 0},
        {"cooldown_s": -1.0},
        {"min_tokens_per_expert": 0.0},
    ],
)
def test_wrong_thresholds_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        RebalancePolicy(**fields)  # type: ignore[arg-type]
