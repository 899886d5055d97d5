"""Worker bodies: when a task beside their loop fails, the heartbeat says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from tests.multiproc.cluster_harness import DEADLINE_S, make_service, run_folder
from tests.unit.flowserve.builders import make_config, make_executor, make_group
from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.run_dir import create_run
from xdeepserve.launch.worker.body import WorkerBody, WorkerContext
from xdeepserve.launch.worker.dp_body import DPBody
from xdeepserve.launch.worker.module_body import ModuleBody


@pytest.fixture
async def context() -> AsyncIterator[WorkerContext]:
    with run_folder():
        run, lease = create_run()
        spec = WorkerSpec(name="dp0", role="attention", rank=0)
        yield WorkerContext(run, make_service(1, 0), spec, 1)
        lease.release()


class BrokenFeed:
    async def follow(self) -> None:
        raise RuntimeError("a table that cannot be")


class BrokenServer:
    num_rounds = num_requests = num_rows = 0

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self.stop = self._stopped.set

    def run(self) -> None:
        self._stopped.wait(DEADLINE_S)

    def beat(self) -> None:
        raise RuntimeError("no segment")


async def error_of(body: WorkerBody) -> str:
    """The first error that a started body tells."""
    await body.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            while (error := body.heartbeat().error) is None:
                await asyncio.sleep(0)
        return error
    finally:
        await body.close()


async def test_a_group_that_cannot_follow_the_routing(
    context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    group = make_group(config, make_executor(config), clock=SYSTEM_CLOCK)
    monkeypatch.setattr(DPBody, "_routing_feed", lambda self: BrokenFeed())
    monkeypatch.setattr(DPBody, "_build", lambda self, feed: group)
    error = await error_of(DPBody(context))
    assert error == "following the routing failed: RuntimeError: a table that cannot be"


async def test_a_worker_that_cannot_show_that_it_lives(
    context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModuleBody, "_build", lambda self: BrokenServer())
    error = await error_of(ModuleBody(context))
    assert error == "the sign of life failed: RuntimeError: no segment"
