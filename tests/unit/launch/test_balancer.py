"""Balancer: every placement is complete, epochs grow, load moves experts, workers come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from xdeepserve.eplb import ExpertLoadReport, ExpertLoadStats, peak_over_mean, rank_load
from xdeepserve.errors import ConfigError
from xdeepserve.launch.deployment import Deployment, ExpertRoleSpec, RolesSpec
from xdeepserve.launch.placement import Placement, expert_placement, idle_ranks
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

    def __init__(self, *, experts: int = 2, replicas: int = 0) -> None:
        self.workers, self.clock = FakeWorkers(), FakeClock()
        self.published: list[Placement] = []
        role = ExpertRoleSpec(count=experts, replicas=replicas)
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


async def test_the_first_placement_is_what_the_slices_say() -> None:
    placement = Run(experts=2, replicas=1).balancer.placement
    assert placement is not None
    assert (placement.epoch, placement.expert) == (0, (0, 1))
    assert placement.table == [[0, 1, 2, 3, 4, 4, 5, 6, 7, 0]] * 3


async def test_a_lasting_skew_moves_experts_and_lowers_the_peak() -> None:
    run = Run()
    before = peak(run.balancer.placement)
    for _ in range(6):
        run.workers.count(HOT)
        await run.look_after(11.0)
    check_epochs_and_completeness(run)
    assert run.published, "nothing was moved"
    assert peak(run.balancer.placement) < before
    loaded = {(layer, expert) for _, experts in run.workers.loads for layer, expert in experts}
    assert loaded, "weights are made present before tokens come"
    heat = run.balancer.heat()
    assert heat is not None
    assert heat.num_migrations >= 1
    assert heat.hottest is not None
    assert heat.hottest[1] == 0


async def test_an_even_load_moves_nothing() -> None:
    run = Run()
    for _ in range(6):
        run.workers.count(np.full(8, 1000))
        await run.look_after(11.0)
    assert run.published == []


async def test_a_trivial_load_moves_nothing_however_skewed_and_long() -> None:
    run = Run()
    for _ in range(20):
        run.workers.count(HOT // 10)
        await run.look_after(11.0)
    assert run.published == []


async def test_a_skew_of_one_window_moves_nothing() -> None:
    run = Run()
    for tokens in (HOT, np.full(8, 1000)) * 6:
        run.workers.count(tokens)
        await run.look_after(11.0)
    assert run.published == []


async def test_experts_move_once_for_a_lasting_skew() -> None:
    run = Run()
    for _ in range(20):
        run.workers.count(HOT)
        await run.look_after(11.0)
    heat = run.balancer.heat()
    assert heat is not None
    assert heat.num_migrations == 1


async def test_a_new_rank_gets_experts_by_migration_once_it_can_serve() -> None:
    run = Run(experts=1)
    assert run.place(2, ready=1).expert == (0,)
    placement = run.place(2)
    assert placement.expert == (0, 1)
    assert {e for row in placement.table for e in row[len(row) // 2 :]} == {-1}
    await run.look_after(0.0)
    check_epochs_and_completeness(run)
    final = run.balancer.placement
    assert final is not None
    held = expert_placement(final, 8).replicas_on_ranks().sum(axis=2)
    assert held.min() >= 4


async def test_a_rank_that_leaves_is_replaced_at_once() -> None:
    run = Run(experts=2)
    placement = run.place(1)
    assert placement.expert == (0,)
    assert (expert_placement(placement, 8).num_replicas == 1).all()
    assert placement.epoch == 1


async def test_a_rank_that_comes_back_is_filled_again() -> None:
    run = Run(experts=3)
    for _ in range(2):
        run.place(2)
        assert run.place(3).expert == (0, 1, 2)
        await run.look_after(0.0)
        assert run.balancer.placement is not None
        assert idle_ranks(run.balancer.placement) == ()
    check_epochs_and_completeness(run)


async def test_the_next_balancer_goes_on_from_the_published_placement() -> None:
    run = Run(experts=1)
    saved = run.place(2)
    successor = Run(experts=2)
    successor.balancer.placement = saved
    assert successor.place(2) is saved
    await successor.look_after(0.0)
    check_epochs_and_completeness(successor)
    assert successor.published[0].epoch == saved.epoch + 1
    assert idle_ranks(successor.published[-1]) == ()


async def test_the_history_of_a_group_is_no_news_to_the_next_balancer() -> None:
    run = Run()
    run.workers.count(HOT)
    await run.look_after(0.0)
    heat = run.balancer.heat()
    assert heat is not None
    assert heat.num_tokens == 0
    run.workers.count(HOT)
    await run.look_after(0.0)
    heat = run.balancer.heat()
    assert heat is not None
    assert heat.num_tokens == 3 * HOT.sum()


async def test_rebalancing_waits_for_the_migration_under_way() -> None:
    run = Run(experts=2, replicas=1)
    reports = [skewed_report(HOT), skewed_report(HOT[::-1])]
    await asyncio.gather(*(run.balancer.rebalance(report) for report in reports))
    check_epochs_and_completeness(run)
    heat = run.balancer.heat()
    assert heat is not None
    assert (heat.num_migrations, heat.is_migrating) == (2, False)


async def test_a_worker_that_does_not_answer_stops_no_migration() -> None:
    run = Run()

    async def no_answer(rank: int, experts: Sequence[tuple[int, int]]) -> bool:
        return False

    run.workers.load = no_answer  # type: ignore[method-assign]
    before = peak(run.balancer.placement)
    await run.balancer.rebalance(skewed_report(HOT))
    assert peak(run.balancer.placement) < before


async def test_nothing_is_migrated_once_all_workers_are_to_end() -> None:
    run = Run(experts=1)
    run.place(2)
    reports = run.workers.reports

    async def stop_meanwhile() -> Mapping[str, ExpertLoadReport]:
        run.place(0)
        return await reports()

    run.workers.reports = stop_meanwhile  # type: ignore[method-assign]
    await run.look_after(0.0)
    assert run.published == []


async def test_a_crashed_rank_keeps_its_place() -> None:
    run = Run(experts=2)
    assert run.place(2, ready=1) is run.balancer.placement
    assert run.place(2, ready=1).epoch == 0


async def test_a_failed_rank_gives_its_work_to_the_others_until_it_is_back() -> None:
    run = Run(experts=3)
    assert run.place(3, failed=[1]).expert == (0, 2)
    assert run.place(3, failed=[1]).epoch == 1, "it is dropped once"
    assert run.balancer.num_dropped == 1
    assert run.balancer.placement is not None
    assert (expert_placement(run.balancer.placement, 8).num_replicas >= 1).all()
    # Started again, it joins when it can serve, and is filled like a new rank.
    assert run.place(3, ready=1).expert == (0, 2)
    assert run.place(3).expert == (0, 1, 2)
    await run.look_after(0.0)
    check_epochs_and_completeness(run)
    assert idle_ranks(run.balancer.placement) == ()


async def test_the_groups_compute_the_experts_while_every_rank_has_failed() -> None:
    run = Run(experts=2)
    nobody = run.place(2, failed=[0, 1])
    assert (nobody.expert, nobody.table) == ((), [[]] * 3)
    assert run.balancer.num_dropped == 2
    assert run.place(2, ready=0) is nobody
    back = run.place(2, ready=1)
    assert back.expert == (0,)
    assert (expert_placement(back, 8).num_replicas == 1).all()
    run.place(2)
    await run.look_after(0.0)
    check_epochs_and_completeness(run)
    assert run.balancer.placement is not None
    assert idle_ranks(run.balancer.placement) == ()


async def test_a_failed_ffn_rank_is_dropped() -> None:
    run = Run(experts=1)
    both = [("ffn", 0), ("ffn", 1)]
    run.balancer.place(wanted=[*both, ("expert", 0)], ready=[*both, ("expert", 0)])
    placement = run.balancer.place(
        wanted=[*both, ("expert", 0)], ready=[("ffn", 1), ("expert", 0)], failed=[("ffn", 0)]
    )
    assert placement.ffn == (1,)
    assert run.balancer.num_dropped == 1


async def test_a_migration_ends_when_the_workers_change() -> None:
    run = Run()
    load = run.workers.load

    async def leave_while_loading(rank: int, experts: Sequence[tuple[int, int]]) -> bool:
        run.place(1)
        return await load(rank, experts)

    run.workers.load = leave_while_loading  # type: ignore[method-assign]
    run.workers.count(HOT)
    await run.balancer.rebalance(run.workers.stats.report())
    assert run.published == []
    assert run.balancer.placement is not None
    assert run.balancer.placement.expert == (0,)


async def test_a_report_of_another_model_is_refused() -> None:
    run = Run()
    other = ExpertLoadStats(num_layers=1, num_experts=4)
    with pytest.raises(ConfigError, match="does not fit"):
        await run.balancer.rebalance(other.report())


def test_peak_over_mean_is_one_when_all_is_even() -> None:
    placement = Run().balancer.placement
    assert placement is not None
    even = np.full((3, 8), 5.0)
    assert peak_over_mean(even, expert_placement(placement, 8)).tolist() == [1.0] * 3
