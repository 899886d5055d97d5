"""Workers die under a small load: no request fails, no text changes, nothing is left behind.

`benchmarks/bench_faults.py` injects every kind of fault, many times, under a large load.
"""

from __future__ import annotations

import argparse

import pytest
from benchmarks.bench_faults import KINDS, run_gateway_kill, run_kind

QUICK = {"expert-spare", "ffn-spare", "group-spare"}
"""The others are run with the soak tests. Supervisor, scaling and thawing have quick tests of their
own in tests/multiproc."""

ARGUMENTS = argparse.Namespace(
    model="smollm2-135m-moe8", times=2, streams=4, tokens=16, undisturbed=0, show_log=False
)

pytestmark = [pytest.mark.weights, pytest.mark.slow]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.soak] * (kind not in QUICK)) for kind in KINDS]
)
def test_nothing_is_lost(kind: str) -> None:
    outcome = run_kind(kind, ARGUMENTS)
    assert dict(outcome.errors) == {}
    assert outcome.num_different == 0
    assert outcome.leftovers == []
    assert outcome.is_clean
    assert len(outcome.disturbed) == ARGUMENTS.times


@pytest.mark.soak
def test_a_killed_gateway_leaves_nothing() -> None:
    assert run_gateway_kill(ARGUMENTS) == []
