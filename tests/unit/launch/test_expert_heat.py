"""The heat of experts: shares, workers and ratios by layer, from a load and a placement."""

from __future__ import annotations

import numpy as np

from xdeepserve.eplb import ExpertPlacement
from xdeepserve.launch.supervisor.expert_heat import layer_heats, rank_ratios
from xdeepserve.launch.supervisor.messages import MAX_HOTTEST, HotExpert

LOAD = np.array([[0, 0, 0, 0], [60, 20, 10, 10], [0, 0, 8, 0]], np.float64)
EVEN = ExpertPlacement.contiguous(num_layers=3, num_experts=4, num_ranks=2)


def test_only_layers_with_tokens_are_named() -> None:
    first, second = layer_heats(LOAD, EVEN, (0, 5))
    assert (first.layer_idx, first.num_tokens, first.rank_ratios) == (1, 100, {0: 1.6, 5: 0.4})
    assert (second.layer_idx, second.num_tokens, second.rank_ratios) == (2, 8, {0: 0.0, 5: 2.0})
    assert second.hottest == (HotExpert(expert=2, share=1.0, ranks=(5,)),)


def test_the_hottest_experts_come_first_with_their_workers() -> None:
    placed = ExpertPlacement.from_physical([[0, 1, -1, 0, 2, 3]] * 3, num_experts=4, num_ranks=2)
    heat = layer_heats(LOAD, placed, (0, 5))[0]
    assert len(heat.hottest) == MAX_HOTTEST
    assert heat.hottest[0] == HotExpert(expert=0, share=0.6, ranks=(0, 5))
    assert heat.hottest[1] == HotExpert(expert=1, share=0.2, ranks=(0,))
    assert heat.rank_ratios == {0: 1.0, 5: 1.0}


def test_ratios_are_one_without_load() -> None:
    assert rank_ratios(np.zeros((3, 4)), EVEN, (1, 2)) == {1: 1.0, 2: 1.0}
    assert rank_ratios(LOAD, EVEN, (1, 2)) == {1: 80 / 54, 2: 28 / 54}
    assert layer_heats(np.zeros((3, 4)), EVEN, (1, 2)) == ()
