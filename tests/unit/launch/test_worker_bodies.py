"""Worker bodies: their errors reach the heartbeat; which experts they have present first."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.multiproc.cluster_harness import DEADLINE_S, make_service, run_folder
from tests.unit.flowserve.builders import make_config, make_executor, make_group
from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.launch.placement import Placement
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.run_dir import create_run
from xdeepserve.launch.supervisor.messages import Membership, SavedState
from xdeepserve.launch.worker import dp_body
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


@pytest.mark.parametrize(
    ("state", "experts"),
    [
        ("missing", [(0, 4), (0, 5), (1, 4), (1, 5)]),
        ("damaged", [(0, 4), (0, 5), (1, 4), (1, 5)]),
        ("of others", [(0, 4), (0, 5), (1, 4), (1, 5)]),
        ("its own", [(0, 2), (1, 1), (1, 7)]),
    ],
)
async def test_a_worker_has_those_experts_present_that_the_placement_gives_it(
    context: WorkerContext, state: str, experts: list[tuple[int, int]]
) -> None:
    run = context.run
    spec = WorkerSpec(name="expert1", role="expert", rank=1, experts=(4, 6))
    if state == "damaged":
        run.state_path.write_bytes(b"{")
    elif state != "missing":
        ranks, table = ((0, 1) if state == "its own" else (0, 2)), [[0, 1, 2, -1], [3, 4, 1, 7]]
        placement = Placement(epoch=1, ffn=(), expert=ranks, table=table)
        membership = Membership(epoch=1, run_id="", counts={}, members=(), placement=placement)
        run.write(run.state_path, SavedState(membership=membership, incarnations={}))
    body = ModuleBody(replace(context, spec=spec))
    assert body._first_experts() == experts


@pytest.mark.parametrize("incarnation", [1, 2])
async def test_a_group_that_is_started_again_does_not_wait_long_for_who_is_down(
    context: WorkerContext, monkeypatch: pytest.MonkeyPatch, incarnation: int
) -> None:
    waited_s: list[float] = []

    class NobodyThere:
        def __init__(self, **_: object) -> None:
            pass

        def wait_complete(self, *, timeout_s: float) -> bool:
            waited_s.append(timeout_s)
            return False

    monkeypatch.setattr(dp_body, "XcclTransport", NobodyThere)
    monkeypatch.setattr(dp_body, "partition", lambda model: ())
    feed = SimpleNamespace(fabric=SimpleNamespace(open_port=lambda *_: None), routing=None)
    body: Any = DPBody(replace(context, incarnation=incarnation))
    body._connect(None, feed)
    assert waited_s == [dp_body.LINK_TIMEOUT_S if incarnation == 1 else dp_body.RELINK_TIMEOUT_S]
