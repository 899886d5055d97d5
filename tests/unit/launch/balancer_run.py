"""A balancer with workers that a test plays, and checks of what it publishes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np

from xdeepserve.eplb import ExpertLoadReport, ExpertLoadStats, rank_load
from xdeepserve.launch.deployment import Deployment, ExpertRoleSpec, RolesSpec
from xdeepserve.launch.placement import Placement, expert_placement
from xdeepserve.launch.plan import ModelShape
from xdeepserve.launch.supervisor.balancer import Balancer
from xdeepserve.testing.fake_clock import FakeClock

SHAPE = ModelShape(name="moe", num_experts=8, has_ffn=True, num_layers=3, hidden_size=8, top_k=2)
HOT = np.array([4000, 3000, 100, 100, 100, 100, 100, 100])
"""Tokens of each expert; the first two are on the same worker at the start."""


class FakeWorkers:
    """Totals that a test sets; remembers what workers were asked to load."""

    def __init__(self) -> None:
        self.stats = ExpertLoadStats(num_layers=3, num_experts=8, num_windows=1)
        self.loads: list[tuple[int, tuple[tuple[int, int], ...]]] = []

    def count(self, tokens: np.ndarray) -> None:
        ids = np.repeat(np.arange(8, dtype=np.int32), tokens)[:, None]
        for layer_idx in range(3):
            self.stats.record(layer_idx, ids)

    async def reports(self) -> Mapping[str, ExpertLoadReport]:
        return {"dp0 1": self.stats.report()}

    async def load(self, rank: int, experts: Sequence[tuple[int, int]]) -> bool:
        self.loads.append((rank, tuple(experts)))
        return True


class Run:
    """A balancer, its workers, and every placement that it published by itself."""

    def __init__(
        self, *, experts: int = 2, replicas: int = 0, rebalance_interval_s: float = 10.0
    ) -> None:
        self.workers, self.clock = FakeWorkers(), FakeClock()
        self.published: list[Placement] = []
        role = ExpertRoleSpec(
            count=experts, replicas=replicas, rebalance_interval_s=rebalance_interval_s
        )
        self.balancer = Balancer(
            SHAPE,
            Deployment(roles=RolesSpec(expert=role)),
            workers=self.workers,
            publish=self.publish,
            clock=self.clock,
            sleep=lambda _: asyncio.sleep(0),
        )
        self.place(experts)

    def publish(self) -> None:
        assert self.balancer.placement is not None
        self.published.append(self.balancer.placement)

    def place(
        self, experts: int, *, ready: int | None = None, failed: Sequence[int] = ()
    ) -> Placement:
        ranks = [("expert", rank) for rank in range(experts)]
        return self.balancer.place(
            wanted=ranks,
            ready=[rank for rank in ranks[:ready] if rank[1] not in failed],
            failed=[("expert", rank) for rank in failed],
        )

    async def look_after(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.balancer.look()


def skewed_report(tokens: np.ndarray) -> ExpertLoadReport:
    workers = FakeWorkers()
    workers.count(tokens)
    return workers.stats.report()


def check_epochs_and_completeness(run: Run) -> None:
    epochs = [placement.epoch for placement in run.published]
    assert epochs == sorted(set(epochs))
    for placement in run.published:
        assert (expert_placement(placement, 8).num_replicas >= 1).all()


def peak(placement: Placement | None) -> float:
    assert placement is not None
    return float(rank_load(np.tile(HOT, (3, 1)), expert_placement(placement, 8)).max())
