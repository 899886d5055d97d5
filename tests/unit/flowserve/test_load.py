"""Sums of load reports."""

from __future__ import annotations

import msgspec

from xdeepserve.flowserve.load import NO_LOAD, counters_of, total_load


def test_accepted_drafts_add_up_by_position() -> None:
    reports = [
        msgspec.structs.replace(
            NO_LOAD, num_running=1, num_drafts=len(accepted), accepted_per_position=accepted
        )
        for accepted in ((3, 1), (), (5, 4, 2))
    ]
    total = total_load(reports)
    assert total.accepted_per_position == (8, 5, 2)
    assert (total.num_running, total.num_drafts) == (3, 5)
    assert counters_of(total).accepted_per_position == (8, 5, 2)
    assert total_load([]) == NO_LOAD
