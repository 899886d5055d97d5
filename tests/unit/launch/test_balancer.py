"""Balancer: every placement is complete, epochs grow, load moves experts, lasting load only."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from tests.unit.launch.balancer_run import (
    HOT,
    FakeWorkers,
    Run,
    check_epochs_and_completeness,
    peak,
    skewed_report,
)
from xdeepserve.eplb import ExpertLoadStats, peak_over_mean
from xdeepserve.errors import CapacityError, ConfigError
from xdeepserve.launch.placement import expert_placement


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


@pytest.mark.parametrize("rebalance_interval_s", [0.0, 10.0])
async def test_what_was_counted_long_ago_weighs_little(rebalance_interval_s: float) -> None:
    run = Run(rebalance_interval_s=rebalance_interval_s)
    await run.look_after(0.0)
    run.workers.count(HOT)
    for _ in range(8):
        await run.look_after(11.0)
    heat = run.balancer.heat()
    assert heat is not None
    assert heat.num_tokens < 0.02 * 3 * HOT.sum()


async def test_rebalancing_waits_for_the_migration_under_way() -> None:
    run = Run(experts=2, replicas=1)
    reports = [skewed_report(HOT), skewed_report(HOT[::-1])]
    await asyncio.gather(*(run.balancer.rebalance(report) for report in reports))
    check_epochs_and_completeness(run)
    heat = run.balancer.heat()
    assert heat is not None
    assert (heat.num_migrations, heat.is_migrating) == (2, False)


async def test_no_tokens_go_to_experts_that_were_not_loaded_and_loading_is_tried_again() -> None:
    run, load = Run(), FakeWorkers.load
    before, answers = run.balancer.placement, [False, False, False]

    async def answer_later(rank: int, experts: Sequence[tuple[int, int]]) -> bool:
        if answers:
            assert run.balancer.placement is before
            return answers.pop()
        return await load(run.workers, rank, experts)

    run.workers.load = answer_later  # type: ignore[method-assign]
    await run.balancer.rebalance(skewed_report(HOT))
    assert answers == []
    assert peak(run.balancer.placement) < peak(before)


async def test_a_rebalance_says_that_a_worker_loads_nothing() -> None:
    run = Run()

    async def no_answer(rank: int, experts: Sequence[tuple[int, int]]) -> bool:
        return False

    run.workers.load = no_answer  # type: ignore[method-assign]
    with pytest.raises(CapacityError, match="have not all moved"):
        await run.balancer.rebalance(skewed_report(HOT))
    assert run.published == []


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


async def test_a_rebalance_goes_on_when_a_worker_joins_meanwhile() -> None:
    run = Run()
    load, ranks = run.workers.load, [("expert", 0), ("expert", 1), ("ffn", 0)]

    async def join_while_loading(rank: int, experts: Sequence[tuple[int, int]]) -> bool:
        run.balancer.place(wanted=ranks, ready=ranks)
        return await load(rank, experts)

    run.workers.load = join_while_loading  # type: ignore[method-assign]
    before = peak(run.balancer.placement)
    await run.balancer.rebalance(skewed_report(HOT))
    assert peak(run.balancer.placement) < before


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
