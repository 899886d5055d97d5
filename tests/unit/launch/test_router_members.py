"""RouterMembers: a drain that fails is logged, and the group can still leave."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.flowserve.fake_engine import INFO
from xdeepserve.flowserve.router import RouterEngine
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.router_members import RouterMembers
from xdeepserve.launch.supervisor.messages import Member, WorkerState


class BrokenRouter(RouterEngine):
    async def drain(self, name: str, *, timeout_s: float) -> None:
        raise RuntimeError(f"{name} cannot be drained")


async def test_a_drain_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    members = RouterMembers(drain_timeout_s=1.0)
    members._router = BrokenRouter(INFO)
    member = Member(
        spec=WorkerSpec(name="dp0", role="attention", rank=0),
        state=WorkerState.DRAINING,
        incarnation=1,
        num_restarts=0,
        socket="dp0.sock",
    )
    await members.draining(member)
    await asyncio.gather(*members._drains.values(), return_exceptions=True)
    (record,) = caplog.records
    assert record.getMessage() == "draining dp0 failed"
