"""foreign_load: others used what the machine used beyond us; a disturbed run is repeated."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace

import pytest
from benchmarks.peers import foreign_load
from benchmarks.peers.foreign_load import MAX_ATTEMPTS, undisturbed, watched


@pytest.fixture(autouse=True)
def machine_of_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run takes 10 s, 8 of which the core is busy and 5 of which are our own."""
    clocks = {"_busy_s": 8.0, "_own_s": 5.0}
    for name, step in clocks.items():
        ticks = itertools.count(0.0, step)
        monkeypatch.setattr(foreign_load, name, lambda *_, ticks=ticks: next(ticks))
    wall = itertools.count(0.0, 10.0)
    monkeypatch.setattr(foreign_load, "time", SimpleNamespace(monotonic=lambda: next(wall)))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def test_the_share_of_others_is_what_is_busy_beyond_our_own() -> None:
    answer, share = watched(1, lambda: "answer")
    assert (answer, share) == ("answer", pytest.approx(0.3))


def test_a_disturbed_run_is_repeated_and_says_so() -> None:
    runs: list[int] = []

    def run() -> dict[str, float]:
        runs.append(len(runs))
        return {"run": runs[-1]}

    assert undisturbed(1, run)["foreign_share"] == pytest.approx(0.3)
    assert len(runs) == MAX_ATTEMPTS
