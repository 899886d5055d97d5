"""Sums of load reports: of several DP groups, and of a group over its restarts."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from xdeepserve.messages import LoadReport

NO_LOAD = LoadReport(num_running=0, num_waiting=0, num_free_blocks=0, num_total_blocks=0)


def total_load(reports: Iterable[LoadReport]) -> LoadReport:
    """The sum, field by field."""
    rows = list(reports)
    names = LoadReport.__struct_fields__
    return LoadReport(**{name: sum(getattr(row, name) for row in rows) for name in names})


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
