"""ExpertLoadStats: counting, the ring of windows, reports between processes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from xdeepserve.eplb import ExpertLoadReport, ExpertLoadStats
from xdeepserve.errors import ConfigError, IntegrityError


def ids(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int32)


def test_tokens_are_counted_per_layer_and_expert() -> None:
    stats = ExpertLoadStats(num_layers=2, num_experts=4)
    stats.record(0, ids([0, 3], [3, 1]))
    stats.record(0, ids([3, -1]))
    stats.record(1, ids([-1, -1]))
    stats.record(1, ids([2, 2]))
    assert stats.load().tolist() == [[1, 1, 0, 3], [0, 0, 2, 0]]


def test_an_empty_step_counts_nothing() -> None:
    stats = ExpertLoadStats(num_layers=1, num_experts=4)
    stats.record(0, np.zeros((0, 2), np.int32))
    assert stats.load().tolist() == [[0, 0, 0, 0]]


def test_windows_age_and_are_forgotten() -> None:
    stats = ExpertLoadStats(num_layers=1, num_experts=2, num_windows=3)
    for count in (1, 2, 3, 4):
        stats.record(0, ids(*[[0]] * count))
        if count < 4:
            stats.roll()
    assert stats.windows()[:, 0, 0].tolist() == [2, 3, 4]
    assert stats.load(decay=0.5)[0, 0] == 4 + 3 / 2 + 2 / 4
    assert stats.load(decay=1.0)[0, 0] == 9


def test_one_window_is_enough() -> None:
    stats = ExpertLoadStats(num_layers=1, num_experts=2, num_windows=1)
    stats.record(0, ids([0]))
    stats.roll()
    stats.record(0, ids([1]))
    assert stats.load().tolist() == [[0, 1]]


def test_reports_of_groups_add_up_over_the_wire() -> None:
    total = ExpertLoadStats(num_layers=1, num_experts=3)
    for group in range(3):
        stats = ExpertLoadStats(num_layers=1, num_experts=3)
        stats.record(0, ids([group, 0]))
        wire = msgspec.msgpack.encode(stats.report())
        total.add(msgspec.msgpack.decode(wire, type=ExpertLoadReport))
    assert total.load().tolist() == [[4, 1, 1]]


def test_a_lost_report_loses_no_counts() -> None:
    total = ExpertLoadStats(num_layers=1, num_experts=2)
    group = ExpertLoadStats(num_layers=1, num_experts=2, num_windows=1)
    before = group.report()
    group.record(0, ids([0, 1]))
    group.report()
    group.record(0, ids([1, 1]))
    total.add(group.report().since(before))
    assert total.load().tolist() == [[1, 3]]


def test_totals_may_wrap() -> None:
    before = ExpertLoadReport(1, 1, (2**32 - 2).to_bytes(4, "little"))
    after = ExpertLoadReport(1, 1, (3).to_bytes(4, "little"))
    assert after.since(before).to_array().tolist() == [[5]]


def test_reports_of_two_models_have_no_difference() -> None:
    with pytest.raises(IntegrityError, match="follows one of"):
        ExpertLoadReport(1, 2, b"\0" * 8).since(ExpertLoadReport(2, 1, b"\0" * 8))


@pytest.mark.parametrize(
    "report",
    [
        ExpertLoadReport(1, 3, b"\0" * 11),
        ExpertLoadReport(1, 0, b""),
        ExpertLoadReport(-1, -3, b"\0" * 12),
        ExpertLoadReport(3, 1, b"\0" * 12),
    ],
)
def test_a_damaged_or_foreign_report_is_refused(report: ExpertLoadReport) -> None:
    with pytest.raises(IntegrityError, match="expert load report"):
        ExpertLoadStats(num_layers=1, num_experts=3).add(report)


def test_an_expert_that_does_not_exist_is_refused() -> None:
    with pytest.raises(IntegrityError, match="expert 3"):
        ExpertLoadStats(num_layers=1, num_experts=3).record(0, ids([3]))


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        ExpertLoadStats(num_layers=1, num_experts=3, num_windows=0)
    with pytest.raises(ConfigError, match="decay"):
        ExpertLoadStats(num_layers=1, num_experts=3).load(decay=0.0)
