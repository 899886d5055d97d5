"""LifeTotals: running totals of workers, added up over the lives of each.

A worker's own counters begin at zero in each life. What it counted after the last look at a life
that has ended is lost; nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Totals = Mapping[str, float]


@dataclass(slots=True)
class _Worker:
    incarnation: int
    ended: dict[str, float] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)

    def end_life(self) -> None:
        for name, value in self.latest.items():
            self.ended[name] = self.ended.get(name, 0.0) + value
        self.latest = {}


class LifeTotals:
    """Totals by worker; one entry for each that ever was, so bounded by the workers of a run."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}

    def note(self, name: str, incarnation: int, totals: Totals) -> None:
        """Take what a worker has counted since the start of its present life.

        A life of another number, or a total that is lower than before, is a new life.
        """
        worker = self._workers.setdefault(name, _Worker(incarnation))
        is_lower = any(value < worker.latest.get(key, 0.0) for key, value in totals.items())
        if incarnation != worker.incarnation or is_lower:
            worker.end_life()
            worker.incarnation = incarnation
        worker.latest |= totals

    def of(self, name: str) -> dict[str, float]:
        """Totals of a worker over all its lives; {} if nothing is known of it."""
        worker = self._workers.get(name)
        if worker is None:
            return {}
        names = worker.ended.keys() | worker.latest.keys()
        return {key: worker.ended.get(key, 0.0) + worker.latest.get(key, 0.0) for key in names}
