"""Experts move between living workers, workers come and go, and no token is another one for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from tests.multiproc.exactness import DEADLINE_S, POLL_S, Topology
from tests.multiproc.toy_service import check_texts, check_texts_during, toy_service
from xdeepserve.eplb import ExpertLoadReport, ExpertLoadStats
from xdeepserve.launch.placement import idle_ranks
from xdeepserve.launch.run_dir import RunDirectory
from xdeepserve.launch.service import load_service
from xdeepserve.launch.supervisor.client import rebalance_run, scale_run, status_of
from xdeepserve.launch.supervisor.messages import ExpertHeat, Membership

pytestmark = pytest.mark.slow

NUM_MIGRATIONS = 6


def skewed(run: RunDirectory, seed: int) -> ExpertLoadReport:
    """A load under which two experts of each layer have almost all tokens."""
    shape = load_service(run).shape
    stats = ExpertLoadStats(num_layers=shape.num_layers, num_experts=shape.num_experts)
    rng = np.random.default_rng(seed)
    for layer_idx in range(shape.num_layers):
        hot = rng.choice(shape.num_experts, 2, replace=False).astype(np.int32)
        stats.record(layer_idx, np.repeat(hot, 1000)[:, None])
    return stats.report()


async def heat_of(run: RunDirectory) -> ExpertHeat:
    heat = (await status_of(run)).expert_heat
    assert heat is not None
    return heat


async def test_migrations_under_load(tmp_path: Path) -> None:
    async def migrate_often(run: RunDirectory) -> None:
        for seed in range(NUM_MIGRATIONS):
            await rebalance_run(run, skewed(run, seed))

    async with toy_service(tmp_path, Topology(attention=2, expert=2, replicas=1)) as service:
        await check_texts_during(service, migrate_often)
        heat = await heat_of(service.run)
        assert heat.num_moves > 0
        assert heat.placement_epoch >= heat.num_migrations > 0


async def test_tokens_are_counted_and_reported(tmp_path: Path) -> None:
    async with toy_service(tmp_path, Topology(attention=1, expert=2)) as service:
        async with asyncio.timeout(DEADLINE_S):
            while (await heat_of(service.run)).num_tokens == 0:
                await check_texts(service, 0)
        heat = await heat_of(service.run)
        assert heat.hottest is not None
        assert 0 < heat.hottest_share <= 1
        assert 1 <= heat.peak_over_mean <= 2


def has_spread(membership: Membership, count: int) -> bool:
    """Whether exactly `count` expert workers are there and each has experts of every layer."""
    placement = membership.placement
    assert placement is not None
    return (
        membership.is_settled() and len(placement.expert) == count and idle_ranks(placement) == ()
    )


async def test_expert_workers_come_and_go_under_load(tmp_path: Path) -> None:
    async def scale_through(run: RunDirectory) -> None:
        for count in (2, 3, 1):
            await scale_run(run, {"expert": count})
            async with asyncio.timeout(DEADLINE_S):
                while not has_spread((await status_of(run)).membership, count):
                    await asyncio.sleep(POLL_S)

    async with toy_service(tmp_path, Topology(attention=1, ffn=1, expert=1)) as service:
        await check_texts_during(service, scale_through)
