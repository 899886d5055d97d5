"""Rings, slots, windows, epochs and lives: any order of operations agrees with the reference.

The rules stand in `model/`, one file per primitive. The default run takes sixty orders of forty
operations, `-m soak` many and longer ones.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.xccl.model.exchanges import Exchanges


@pytest.mark.parametrize(
    ("orders", "operations"), [(60, 40), pytest.param(500, 100, marks=pytest.mark.soak)]
)
def test_any_order_of_operations_agrees_with_the_reference(orders: int, operations: int) -> None:
    run_state_machine_as_test(
        Exchanges,
        settings=settings(
            max_examples=orders,
            stateful_step_count=operations,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
