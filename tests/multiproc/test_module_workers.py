"""FFN and expert workers of a running service: they freeze and thaw, share work, come and go."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.multiproc.exactness import DEADLINE_S, POLL_S, Topology
from tests.multiproc.toy_service import check_texts_during, toy_service
from xdeepserve.launch.run_dir import RunDirectory
from xdeepserve.launch.supervisor.client import scale_run, status_of
from xdeepserve.testing.fault_drill import thaw_worker
from xdeepserve.testing.live_service import LiveRun, count_in

pytestmark = pytest.mark.slow

FROZEN_S = 1.5
"""Longer than groups wait for a silent worker, shorter than the supervisor does."""


@pytest.mark.parametrize("worker", ["expert1", "ffn0"])
async def test_a_worker_that_was_frozen_serves_again_and_its_late_answers_are_dropped(
    worker: str, tmp_path: Path
) -> None:
    async def freeze(run: RunDirectory) -> None:
        await thaw_worker(worker, FROZEN_S)(LiveRun(run))

    async with toy_service(tmp_path, Topology(attention=1, ffn=1, expert=2)) as service:
        await check_texts_during(service, freeze)


async def until_all_serve(run: RunDirectory, count: int) -> None:
    """Wait until there are so many FFN workers and each has served more than at the call."""
    names = [f"ffn{rank}" for rank in range(count)]
    before = await status_of(run)
    async with asyncio.timeout(DEADLINE_S):
        while True:
            now = await status_of(run)
            grown = [count_in(now, "rows", name) > count_in(before, "rows", name) for name in names]
            there = [m.name for m in now.membership.members if m.spec.role == "ffn"]
            if there == names and all(grown):
                return
            await asyncio.sleep(POLL_S)


async def test_ffn_workers_come_and_go_under_load_and_all_of_them_serve_one_group(
    tmp_path: Path,
) -> None:
    async def scale_through(run: RunDirectory) -> None:
        await until_all_serve(run, 1)
        for count in (2, 3, 1):
            await scale_run(run, {"ffn": count})
            await until_all_serve(run, count)

    async with toy_service(tmp_path, Topology(attention=1, ffn=1, expert=1)) as service:
        await check_texts_during(service, scale_through)
