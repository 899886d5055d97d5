"""A cluster of obedient test workers, and waiting for its membership to become something."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xdeepserve import envs
from xdeepserve.errors import ConnectionLost
from xdeepserve.launch.cluster import Cluster
from xdeepserve.launch.deployment import (
    ROLES,
    AttentionRoleSpec,
    Deployment,
    ExpertRoleSpec,
    RolesSpec,
    SupervisionConfig,
)
from xdeepserve.launch.plan import ModelShape
from xdeepserve.launch.service import ServiceConfig
from xdeepserve.launch.supervisor.messages import Member, Membership, WorkerState

DEADLINE_S = 15.0

SUPERVISION = SupervisionConfig(
    heartbeat_interval_s=0.05,
    freeze_timeout_s=10.0,
    busy_timeout_s=30.0,
    start_timeout_s=10.0,
    drain_timeout_s=2.0,
    stop_timeout_s=1.0,
    backoff_initial_s=0.01,
    backoff_max_s=0.1,
    crash_loop_limit=3,
    crash_loop_window_s=60.0,
)


def make_service(attention: int, expert: int, **supervision: float) -> ServiceConfig:
    """A service whose every role is played by the obedient test body.

    Args:
        supervision: fields that differ from SUPERVISION.
    """
    deployment = Deployment(
        model="none",
        roles=RolesSpec(
            attention=AttentionRoleSpec(count=attention), expert=ExpertRoleSpec(count=expert)
        ),
        supervision=replace(SUPERVISION, **supervision),
    )
    return ServiceConfig(
        model_path="none",
        model_name="none",
        shape=ModelShape(
            name="none", num_experts=8, has_ffn=True, num_layers=2, hidden_size=64, top_k=2
        ),
        deployment=deployment,
        bodies=dict.fromkeys(ROLES, "xdeepserve.testing.worker_body:make_body"),
    )


class Recorder:
    """A MemberListener that remembers what it was told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []

    async def joined(self, member: Member) -> None:
        self.events.append(("joined", member.name, member.incarnation))

    async def draining(self, member: Member) -> None:
        self.events.append(("draining", member.name, member.incarnation))

    async def left(self, member: Member) -> None:
        self.events.append(("left", member.name, member.incarnation))


def pids_of(membership: Membership) -> dict[str, int]:
    """Process of each worker that has one."""
    return {m.name: m.process.pid for m in membership.members if m.process is not None}


def is_in(name: str, state: WorkerState, incarnation: int) -> Callable[[Membership], bool]:
    def check(membership: Membership) -> bool:
        member = membership.find(name)
        return member is not None and member.state is state and member.incarnation == incarnation

    return check


def is_settled(*names: str) -> Callable[[Membership], bool]:
    def check(membership: Membership) -> bool:
        return [m.name for m in membership.members] == list(names) and all(
            m.state is WorkerState.READY for m in membership.members
        )

    return check


def supervisor_pid(cluster: Cluster) -> int:
    """Process of the present supervisor."""
    assert cluster._supervisor is not None
    return cluster._supervisor.identity.pid


class RunningCluster:
    """A started cluster and what tests do to it."""

    def __init__(self, cluster: Cluster, recorder: Recorder) -> None:
        self.cluster = cluster
        self.events = recorder.events

    @property
    def membership(self) -> Membership:
        assert self.cluster.membership is not None
        return self.cluster.membership

    @property
    def supervisor_pid(self) -> int:
        return supervisor_pid(self.cluster)

    def member(self, name: str) -> Member:
        found = self.membership.find(name)
        assert found is not None, f"{name} is no member"
        return found

    def pid(self, name: str) -> int:
        process = self.member(name).process
        assert process is not None, f"{name} has no process"
        return process.pid

    def pids(self) -> dict[str, int]:
        return pids_of(self.membership)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid(name), number)

    def order(self, name: str, what: str) -> Path:
        path = self.cluster.run.path / f"{name}.{what}"
        path.touch()
        return path

    async def until(self, condition: Callable[[Membership], bool]) -> Membership:
        """The first membership from now on that fulfils the condition."""
        async with asyncio.timeout(DEADLINE_S), self.cluster._news:
            await self.cluster._news.wait_for(lambda: condition(self.membership))
            return self.membership

    async def until_next_supervisor(self, former_pid: int) -> Membership:
        """What another supervisor says once it has all workers ready."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with suppress(ConnectionLost):
                    status = await self.cluster.status()
                    if status.supervisor.pid != former_pid and status.membership.is_settled():
                        return status.membership
                await asyncio.sleep(0.02)

    async def until_told(self) -> None:
        """Wait until the listener knows the present membership."""
        async with asyncio.timeout(DEADLINE_S), self.cluster._news:
            await self.cluster._news.wait_for(lambda: not self.cluster._is_listener_behind())


def refuse_processes(monkeypatch: pytest.MonkeyPatch, times: int) -> list[object]:
    """The machine has no room for another process so many times; returns who asked."""
    asked: list[object] = []
    start = subprocess.Popen

    def start_later(command: object, **how: Any) -> subprocess.Popen[bytes]:
        asked.append(command)
        if len(asked) <= times:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return start(command, **how)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", start_later)
    return asked


@contextmanager
def run_folder() -> Iterator[Path]:
    """A short XDEEPSERVE_RUN_DIR (paths of sockets are limited), removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="xt") as folder, envs.RUN_DIR.override(folder):
        yield Path(folder)


@asynccontextmanager
async def running_cluster(
    *, attention: int = 1, expert: int = 0, orders: Sequence[str] = (), **supervision: float
) -> AsyncIterator[RunningCluster]:
    """A cluster whose workers are ready; afterwards nothing of it may be left.

    Args:
        orders: for the workers, there before they start.
        supervision: see make_service.
    """
    recorder = Recorder()
    with run_folder() as folder:
        cluster = Cluster(make_service(attention, expert, **supervision), recorder)
        for order in orders:
            (cluster.run.path / order).touch()
        try:
            await cluster.start(timeout_s=DEADLINE_S)
            yield RunningCluster(cluster, recorder)
        finally:
            await cluster.stop(drain_timeout_s=1.0)
        assert list(folder.iterdir()) == []
