"""Sums of load reports: of several DP groups, and of a group over its restarts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

import msgspec

from xdeepserve.messages import LoadReport

NO_LOAD = LoadReport(num_running=0, num_waiting=0, num_free_blocks=0, num_total_blocks=0)


def total_load(reports: Iterable[LoadReport]) -> LoadReport:
    """The sum, field by field."""
    rows = list(reports)
    names = [name for name in LoadReport.__struct_fields__ if name != "accepted_per_position"]
    by_position = zip_longest(*(row.accepted_per_position for row in rows), fillvalue=0)
    return LoadReport(
        accepted_per_position=tuple(map(sum, by_position)),
        **{name: sum(getattr(row, name) for row in rows) for name in names},
    )


def counters_of(report: LoadReport) -> LoadReport:
    """Only what a group has done; nothing of what it holds. What is left when it is gone."""
    return msgspec.structs.replace(
        report,
        num_running=0,
        num_waiting=0,
        num_free_blocks=0,
        num_total_blocks=0,
        num_reserved_blocks=0,
    )
