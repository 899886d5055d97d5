"""LifeTotals: what a worker counted over all its lives never goes down."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xdeepserve.launch.life_totals import LifeTotals


def test_lives_are_added_up() -> None:
    totals = LifeTotals()
    assert totals.of("dp0") == {}
    totals.note("dp0", 1, {"a": 5, "b": 1})
    totals.note("dp0", 1, {"a": 7})
    assert totals.of("dp0") == {"a": 7, "b": 1}
    totals.note("dp0", 2, {"a": 7})
    assert totals.of("dp0") == {"a": 14, "b": 1}
    totals.note("dp1", 1, {"a": 1})
    assert totals.of("dp0") == {"a": 14, "b": 1}


def test_a_life_that_nobody_announced_is_seen_by_its_lower_total() -> None:
    totals = LifeTotals()
    totals.note("dp0", 1, {"a": 5})
    totals.note("dp0", 1, {"a": 2})
    assert totals.of("dp0") == {"a": 7}


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=5))
def test_each_increment_counts_once(lives: list[list[int]]) -> None:
    totals, shown = LifeTotals(), [0.0]
    for incarnation, increments in enumerate(lives):
        counted = 0
        for increment in increments:
            counted += increment
            totals.note("dp0", incarnation, {"a": counted})
            shown.append(totals.of("dp0")["a"])
    assert shown == sorted(shown)
    assert shown[-1] == sum(map(sum, lives))
