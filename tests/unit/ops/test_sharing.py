"""How threads share a weight's panels, and fetch the next weight early, does not reach results."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.ops.cases import ISAS, make_cpu, normal
from xdeepserve.ops import WeightDtype

INNER = 700
"""So wide that even two panels are spread over the threads."""


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(WeightDtype))
def test_one_row_over_any_number_of_panels_and_threads(
    rng: np.random.Generator, isa: str, dtype: WeightDtype
) -> None:
    backends = [make_cpu(isa=isa, num_threads=threads) for threads in (1, 2, 3, 5)]
    for panels in (1, 2, 3, 4, 5, 7, 11):
        weight, x = normal(rng, 32 * panels - 5, INNER), normal(rng, 1, INNER)
        packed = backends[0].pack(weight, dtype=dtype)
        want = backends[0].linear(x, packed)
        for ops in backends[1:]:
            for _ in range(10):  # late threads lose items to others, now these, now those
                np.testing.assert_array_equal(ops.linear(x, packed), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(WeightDtype))
def test_weights_come_in_any_order_and_go(
    rng: np.random.Generator, isa: str, dtype: WeightDtype
) -> None:
    ops = make_cpu(isa=isa, num_threads=3)
    x = normal(rng, 2, INNER)
    weights = [ops.pack(normal(rng, n, INNER), dtype=dtype) for n in (300, 4000, 64, 900)]
    want = [ops.linear(x, weight) for weight in weights]
    for order in ([0, 1, 2, 3] * 3, [3, 2, 0, 1] * 2):
        for index in order:
            np.testing.assert_array_equal(ops.linear(x, weights[index]), want[index])
    del weights[1], want[1]  # what usually follows the first is no longer in memory
    for index in [0, 1, 2] * 3:
        np.testing.assert_array_equal(ops.linear(x, weights[index]), want[index])


@pytest.mark.parametrize("dtype", list(WeightDtype))
def test_experts_of_few_rows_over_many_threads(
    rng: np.random.Generator, dtype: WeightDtype
) -> None:
    one, many = make_cpu(isa=ISAS[-1], num_threads=1), make_cpu(isa=ISAS[-1], num_threads=5)
    gate_up = one.pack(normal(rng, 6, 192, 160), dtype=dtype)
    down = one.pack(normal(rng, 6, 160, 96), dtype=dtype)
    counts = np.array([1, 0, 2, 0, 200, 1], np.int32)
    x = normal(rng, int(counts.sum()), 160)
    want = one.expert_mlp(x, counts, gate_up, down)
    for _ in range(5):
        np.testing.assert_array_equal(many.expert_mlp(x, counts, gate_up, down), want)
