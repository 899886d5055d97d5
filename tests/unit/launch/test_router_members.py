"""RouterMembers: what fails behind it is told, and nothing of a failed join stays."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from tests.multiproc.cluster_harness import make_service, run_folder
from tests.unit.flowserve.builders import make_request
from tests.unit.flowserve.fake_engine import INFO, FakeEngine
from xdeepserve.errors import ConfigError, EngineDeadError
from xdeepserve.flowserve.remote_engine import RemoteEngine
from xdeepserve.flowserve.router import RouterEngine
from xdeepserve.launch.background import Background
from xdeepserve.launch.cluster import Cluster
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.router_members import RouterMembers
from xdeepserve.launch.supervisor.messages import Member, WorkerState


def make_member(rank: int, state: WorkerState) -> Member:
    spec = WorkerSpec(name=f"dp{rank}", role="attention", rank=rank)
    return Member(spec=spec, state=state, incarnation=1, num_restarts=0, socket=f"dp{rank}.sock")


class BrokenRouter(RouterEngine):
    async def drain(self, name: str, *, timeout_s: float) -> None:
        raise RuntimeError(f"{name} cannot be drained")


async def test_a_drain_that_fails_ends_the_service() -> None:
    background = Background()
    members = RouterMembers(drain_timeout_s=1.0, background=background)
    members._router = BrokenRouter(INFO)
    with run_folder():
        cluster = Cluster(make_service(1, 0), members, background=background)
        await members.draining(make_member(0, WorkerState.DRAINING))
        forever = asyncio.get_running_loop().create_future()
        with pytest.raises(EngineDeadError, match=r"draining dp0 failed: .*dp0 cannot be drained"):
            await cluster.background.guard(forever)
        await cluster.stop(drain_timeout_s=0.0)


async def test_a_drain_ends_with_the_service() -> None:
    background = Background()
    members = RouterMembers(drain_timeout_s=3600.0, background=background)
    router = members._router = RouterEngine(INFO)
    router.add("dp0", FakeEngine())
    stream = router.generate(request=make_request("r"))
    with run_folder():
        cluster = Cluster(make_service(1, 0), members, background=background)
        await members.draining(make_member(0, WorkerState.DRAINING))
        drain = members._drains["dp0"]
        await asyncio.sleep(0)
        assert not drain.done()
        await cluster.stop(drain_timeout_s=0.0)
    assert drain.cancelled()
    await stream.aclose()


async def test_a_group_that_cannot_be_routed_to_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [FakeEngine(), FakeEngine(msgspec.structs.replace(INFO, model="other"))]
    waiting = iter(engines)

    async def connect(path: Path, *, timeout_s: float) -> FakeEngine:
        return next(waiting)

    monkeypatch.setattr(RemoteEngine, "connect", connect)
    members = RouterMembers(drain_timeout_s=1.0, background=Background())
    await members.joined(make_member(0, WorkerState.READY))
    with pytest.raises(ConfigError, match="dp1 serves"):
        await members.joined(make_member(1, WorkerState.READY))
    assert [engine.is_closed for engine in engines] == [False, True]
