"""Units of experts: slices, and what they add up to."""

from __future__ import annotations

import numpy as np

from xdeepserve.models.units import ExpertUnit
from xdeepserve.ops import WeightDtype, get_ops
from xdeepserve.testing.toy_models import pseudo_random


def test_a_slice_of_experts_gives_the_same_rows() -> None:
    ops = get_ops("reference")
    gate_up = ops.pack(pseudo_random("gate_up", (6, 16, 12)), dtype=WeightDtype.INT8)
    down = ops.pack(pseudo_random("down", (6, 12, 8)), dtype=WeightDtype.INT8)
    unit = ExpertUnit(ops, gate_up, down)
    rows = pseudo_random("rows", (5, 12))
    whole = unit(rows, np.array([1, 0, 2, 0, 2, 0], np.int32))
    part = unit.experts(2, 5)
    assert (part.first, part.num_experts) == (2, 3)
    np.testing.assert_array_equal(part(rows[1:], np.array([2, 0, 2], np.int32)), whole[1:])
    again = part.experts(4, 5)
    np.testing.assert_array_equal(again(rows[3:], np.array([2], np.int32)), whole[3:])


def test_routed_output_is_the_weighted_sum_in_slot_order() -> None:
    ops = get_ops("reference")
    gate_up = ops.pack(pseudo_random("gate_up", (4, 16, 12)), dtype=WeightDtype.FLOAT32)
    down = ops.pack(pseudo_random("down", (4, 12, 8)), dtype=WeightDtype.FLOAT32)
    unit = ExpertUnit(ops, gate_up, down)
    x = pseudo_random("x", (3, 12))
    topk_ids = np.array([[3, 1], [0, 3], [2, -1]], np.int32)
    topk_weights = np.array([[0.75, 0.25], [0.5, 0.5], [1.0, 9.0]], np.float32)
    expected = np.zeros_like(x)
    for (token, slot), expert in np.ndenumerate(topk_ids):
        if expert >= 0:
            mlp = ops.swiglu_mlp(x[token : token + 1], gate_up.groups(expert, expert + 1),
                                 down.groups(expert, expert + 1))  # fmt: skip
            expected[token] += topk_weights[token, slot] * mlp[0]
    np.testing.assert_array_equal(unit.routed(x, topk_ids, topk_weights), expected)
