"""The cost model over windows: bursts count, the base stays."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.eplb.loads import with_hottest
from xdeepserve.eplb import (
    ExpertPlacement,
    check_placement,
    peak_over_mean,
    place_redundant_experts,
)
from xdeepserve.eplb.cost_model import replicate_by_cost
from xdeepserve.errors import ConfigError


def test_a_burst_gets_the_replica_that_the_average_would_not_give() -> None:
    # expert 0 is hottest on average, but in no window does splitting it shorten the layer;
    # splitting 1 does, in the second
    windows = np.array([[[60, 0, 60]], [[60, 100, 0]]])
    assert replicate_by_cost(windows, 4).tolist() == [[1, 2, 1]]


def test_each_step_takes_the_largest_saving() -> None:
    windows = np.array([[[90, 30, 10]]])
    assert replicate_by_cost(windows, 4).tolist() == [[2, 1, 1]]
    assert replicate_by_cost(windows, 5).tolist() == [[3, 1, 1]]
    assert replicate_by_cost(windows, 6, max_per_expert=2).tolist() == [[2, 2, 2]]


def test_the_base_stays_and_the_hottest_is_spread() -> None:
    load = with_hottest(1, 3, 64, times_mean=30)
    placed = place_redundant_experts(load[None], num_replicas=72, num_ranks=8)
    base = ExpertPlacement.contiguous(num_layers=3, num_experts=64, num_ranks=8)
    check_placement(placed, slots_per_rank=9)
    assert np.array_equal(placed.by_rank()[:, :, :8], base.by_rank())
    assert (peak_over_mean(load, placed) < peak_over_mean(load, base)).all()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 8"):
        place_redundant_experts(np.ones((1, 1, 8)), num_replicas=7, num_ranks=2)
    with pytest.raises(ConfigError, match="W, L, E"):
        place_redundant_experts(np.ones((1, 8)), num_replicas=8, num_ranks=2)
