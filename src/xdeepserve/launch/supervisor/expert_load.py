"""ExpertLoad: what the DP groups have counted of late, from the running totals that they report."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from xdeepserve.eplb import ExpertLoadReport, ExpertLoadStats
from xdeepserve.eplb.rows import F64
from xdeepserve.errors import ConfigError, IntegrityError
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

    def windows(self) -> list[F64]:
        """[L, E] of each window, the open one last; to be asked when it is over."""
        return list(self._stats.windows().astype(np.float64))

    def prior(self) -> F64:
        """`recent` with one more token for every expert: without traffic, all weigh the same."""
        weighed: F64 = self.recent() + 1.0
        return weighed

    def prior_of(self, report: ExpertLoadReport) -> F64:
        """A load that somebody names, as `prior`.

        Raises:
            ConfigError: it is of another model.
        """
        counts, expected = report.to_array(), self.recent().shape
        if counts.shape != expected:
            raise ConfigError(
                f"a load of {counts.shape} layers and experts does not fit the model's {expected}"
            )
        return counts.astype(np.float64) + 1.0
