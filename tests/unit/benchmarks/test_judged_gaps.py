"""How the fault and migration benchmarks judge gaps: against the aim, and against quiet times."""

from __future__ import annotations

from collections import Counter

import pytest
from benchmarks.bench_faults import Outcome
from benchmarks.flip_stalls import stall_of_longest, verdict

from xdeepserve.testing.fault_drill import DrillResult


def drill(gap_s: float) -> DrillResult:
    return DrillResult(num_answers=1, errors=Counter(), num_different=0, gap_s=gap_s, settled_s=0.0)


def test_a_gap_beyond_the_aim_is_late_whatever_the_undisturbed_one_is() -> None:
    undisturbed, disturbed = [drill(0.1), drill(0.3)], [drill(0.9), drill(1.2), drill(1.4)]
    outcome = Outcome(undisturbed, disturbed, leftovers=[], exit_code=0)
    assert outcome.num_late(1.0) == 2
    assert outcome.num_late_by_fault(1.0) == 1


def test_the_stall_is_between_the_longest_gaps_of_all() -> None:
    stall = stall_of_longest(calm_ms=[100.0, 300.0, 200.0], moving_ms=[250.0, 310.0, 210.0])
    assert stall["added_ms"] == pytest.approx(10.0)
    assert stall["added_in_a_round_longest_ms"] == pytest.approx(150.0)
    assert stall["added_in_a_round_median_ms"] == pytest.approx(10.0)


def test_a_stall_within_the_noise_is_undecided() -> None:
    noisy = stall_of_longest(calm_ms=[100.0, 300.0], moving_ms=[150.0, 250.0])
    assert verdict(noisy, 20.0).startswith("undecided")
    assert verdict(stall_of_longest([100.0, 102.0], [105.0, 104.0]), 20.0) == "met"
    assert verdict(stall_of_longest([100.0, 102.0], [105.0, 134.0]), 20.0) == "missed"
