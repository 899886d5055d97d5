"""Balancer: workers come and go, fail, and are filled; also across supervisors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.unit.launch.balancer_run import Run, check_epochs_and_completeness
from xdeepserve.eplb import ExpertLoadReport, ExpertPlacement
from xdeepserve.launch import placement
from xdeepserve.launch.placement import expert_placement, idle_ranks, plan_experts
from xdeepserve.launch.supervisor import balancer, migration


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


async def test_who_leaves_is_replaced_without_a_search_and_the_next_look_improves_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def search(*args: object, **kwargs: object) -> ExpertPlacement:
        raise AssertionError("whoever publishes would wait for it")

    run = Run(experts=4)
    await run.look_after(0.0)
    run.workers.count(np.array([900, 900, 10, 10, 500, 500, 500, 500]))
    await run.look_after(0.0)
    with monkeypatch.context() as patch:
        patch.setattr(placement, "place_experts", search)
        # The light rank (2, 3) stays, and takes over the heaviest of (0, 1).
        left = run.balancer.place(
            wanted=[("expert", rank) for rank in (1, 2, 3)], ready=[], failed=[]
        )
    counts = expert_placement(left, 8).replicas_on_ranks()
    assert (counts.sum(axis=1) == 1).all(), "every expert is somewhere, once"
    assert counts[0, 0, [0, 2, 3]].tolist() == [1, 1, 1]
    assert run.published == []
    await run.look_after(0.0)
    assert run.published, "the rest is for the next look"
    check_epochs_and_completeness(run)


async def test_a_rank_that_comes_back_is_filled_again() -> None:
    run = Run(experts=3)
    for _ in range(2):
        run.place(2)
        assert run.place(3).expert == (0, 1, 2)
        await run.look_after(0.0)
        assert run.balancer.placement is not None
        assert idle_ranks(run.balancer.placement) == ()
    check_epochs_and_completeness(run)


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_a_spread_that_is_cut_short_is_finished(
    is_replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "MAX_MOVES", 4)  # a layer's
    run = Run(experts=1)
    run.place(2)
    load, experts = run.workers.load, [("expert", 0), ("expert", 1)]

    async def join_after_the_first_flip(rank: int, moves: Sequence[tuple[int, int]]) -> bool:
        if run.published:
            ranks = [*experts, ("ffn", 0)]
            run.balancer.place(wanted=ranks, ready=ranks)
        return await load(rank, moves)

    run.workers.load = join_after_the_first_flip  # type: ignore[method-assign]
    await run.look_after(0.0)
    cut_short = run.balancer.placement
    assert cut_short is not None
    assert (cut_short.ffn, idle_ranks(cut_short)) == ((0,), (1,))
    if is_replaced:
        run = Run(experts=2)
        run.balancer.restore(cut_short)
        run.balancer.place(wanted=[*experts, ("ffn", 0)], ready=[*experts, ("ffn", 0)])
    run.workers.load = load  # type: ignore[method-assign]
    await run.look_after(0.0)
    check_epochs_and_completeness(run)
    assert run.balancer.placement is not None
    held = expert_placement(run.balancer.placement, 8).replicas_on_ranks().sum(axis=2)
    assert held.tolist() == [[4, 4]] * 3
    num_flips = len(run.published)
    await run.look_after(0.0)
    assert len(run.published) == num_flips


async def test_a_layer_that_leaves_a_rank_empty_is_planned_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans = []

    def plan(*problem: Any) -> tuple[ExpertPlacement, ExpertPlacement]:
        plans.append(problem)
        return plan_experts(*problem)

    monkeypatch.setattr(balancer, "plan_experts", plan)
    run = Run(experts=4)
    run.place(5)
    await run.look_after(0.0)
    assert run.balancer.placement is not None
    assert idle_ranks(run.balancer.placement) == (4,), "one of 8 less leaves three pairs"
    await run.look_after(0.0)
    assert len(plans) == 1


async def test_the_next_balancer_goes_on_from_the_published_placement() -> None:
    run = Run(experts=1)
    saved = run.place(2)
    successor = Run(experts=2)
    successor.balancer.restore(saved)
    assert successor.place(2) is saved
    await successor.look_after(0.0)
    check_epochs_and_completeness(successor)
    assert successor.published[0].epoch == saved.epoch + 1
    assert idle_ranks(successor.published[-1]) == ()


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


async def test_a_new_rank_that_loads_nothing_gets_nothing_until_it_does() -> None:
    run = Run(experts=1)
    run.place(2)
    load, asked = run.workers.load, []

    async def no_answer(rank: int, experts: Sequence[tuple[int, int]]) -> bool:
        asked.append(rank)
        return False

    run.workers.load = no_answer  # type: ignore[method-assign]
    for _ in range(2):
        await run.look_after(0.0)
    assert (asked, run.published) == ([1], []), "it has some time before it is asked again"
    run.workers.load = load  # type: ignore[method-assign]
    await run.look_after(balancer.RETRY_INTERVAL_S)
    assert run.balancer.placement is not None
    assert idle_ranks(run.balancer.placement) == ()


async def test_a_rank_that_is_down_does_not_keep_a_new_one_empty() -> None:
    run = Run(experts=2, replicas=1)
    load, asked = run.workers.load, list[tuple[int, int]]()

    async def is_down(rank: int, experts: Sequence[tuple[int, int]]) -> bool:
        asked.extend(experts if rank == 1 else ())
        return rank != 1 and await load(rank, experts)

    run.workers.load = is_down  # type: ignore[method-assign]
    await run.look_after(0.0)
    run.workers.count(np.array([10, 900, 10, 900, 10, 10, 10, 900]))
    before = expert_placement(run.place(3), 8).replicas_on_ranks()
    await run.look_after(0.0)
    assert asked, "it was to load something"
    check_epochs_and_completeness(run)
    assert run.balancer.placement is not None
    assert idle_ranks(run.balancer.placement) == ()
    held = expert_placement(run.balancer.placement, 8).replicas_on_ranks()
    assert (held[:, 1] <= before[:, 1]).all(), "it has loaded nothing"
    run.workers.load = load  # type: ignore[method-assign]
    await run.look_after(balancer.RETRY_INTERVAL_S)
    num_flips = len(run.published)
    await run.look_after(balancer.RETRY_INTERVAL_S)
    assert len(run.published) == num_flips, "all is done"
    check_epochs_and_completeness(run)
