"""ExpertLoad: what the DP groups have counted of late, from the running totals that they report."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from xdeepserve.eplb import ExpertLoadReport, ExpertLoadStats, ExpertPlacement, rank_load
from xdeepserve.eplb.rows import F64
from xdeepserve.errors import IntegrityError
from xdeepserve.launch.plan import ModelShape

logger = logging.getLogger(__name__)


class ExpertLoad:
    """Counts of a run in time windows, all DP groups together."""

    def __init__(self, shape: ModelShape) -> None:
        self._stats = ExpertLoadStats(num_layers=shape.num_layers, num_experts=shape.num_experts)
        self._latest: dict[str, ExpertLoadReport] = {}

    def add(self, reports: Mapping[str, ExpertLoadReport]) -> None:
        """Count what each life of a group has added since its report before.

        The first report of a life only says where to count from: a new supervisor must not take
        the history of hours for news.
        """
        for name, report in reports.items():
            try:
                self._stats.add(report.since(self._latest.get(name, report)))
            except IntegrityError as exc:
                logger.error("the report of %s is left out: %s", name, exc.message)
                continue
            self._latest[name] = report
        lives = {name.split()[0]: name for name in self._latest}
        self._latest = {name: self._latest[name] for name in lives.values()}

    def roll(self) -> None:
        """Begin the next window."""
        self._stats.roll()

    def recent(self) -> F64:
        """[L, E] tokens per expert, the latest windows counting most."""
        return self._stats.load()

    def prior(self) -> F64:
        """`recent` with one more token for every expert: without traffic, all weigh the same."""
        weighed: F64 = self.recent() + 1.0
        return weighed


def peak_over_mean(load: F64, placement: ExpertPlacement) -> float:
    """Summed peaks over summed means of the ranks; 1 without load."""
    by_rank = rank_load(load, placement)
    mean = float(by_rank.mean(axis=1).sum())
    return float(by_rank.max(axis=1).sum()) / mean if mean > 0 else 1.0


def hottest_expert(load: F64) -> tuple[tuple[int, int] | None, float]:
    """((layer, expert), share of its layer's tokens), the largest such share."""
    total = load.sum(axis=1, keepdims=True)
    share = np.divide(load, total, out=np.zeros_like(load), where=total > 0)
    layer_idx, expert = np.unravel_index(int(share.argmax()), share.shape)
    hottest = float(share[layer_idx, expert])
    return ((int(layer_idx), int(expert)), hottest) if hottest > 0 else (None, 0.0)
