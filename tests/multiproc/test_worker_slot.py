"""A worker slot with a real process: every state that it goes through, in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from tests.multiproc.cluster_harness import DEADLINE_S, make_service, refuse_processes, run_folder
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.run_dir import RunDirectory, create_run
from xdeepserve.launch.supervisor.messages import Member, WorkerState
from xdeepserve.launch.supervisor.worker_slot import WorkerSlot


class RunningSlot:
    """A slot and all that it has told."""

    def __init__(
        self, run: RunDirectory, known: dict[str, Any], supervision: dict[str, float]
    ) -> None:
        service = make_service(1, 0, **supervision)
        service.save(run)
        self.run = run
        self.seen: list[Member] = []
        self._news = asyncio.Condition()
        new = Member(
            spec=WorkerSpec(name="dp0", role="attention", rank=0),
            state=WorkerState.STARTING,
            incarnation=0,
            num_restarts=0,
            socket=str(run.socket_path("dp0")),
        )
        member = msgspec.structs.replace(new, **known)
        config = service.deployment.supervision
        self.slot = WorkerSlot(member, run=run, config=config, on_change=self._on_change)
        self._changed = asyncio.Event()

    def _on_change(self) -> None:
        self.seen.append(self.slot.member)
        self._changed.set()

    async def until(self, condition: Callable[[Member], bool]) -> None:
        """Wait until some member that was told fulfils the condition."""
        async with asyncio.timeout(DEADLINE_S):
            while not any(condition(member) for member in self.seen):
                self._changed.clear()
                await self._changed.wait()

    def states(self, incarnation: int) -> list[WorkerState]:
        """Without repetitions."""
        states = [member.state for member in self.seen if member.incarnation == incarnation]
        return [state for n, state in enumerate(states) if states[n - 1 : n] != [state]]


@asynccontextmanager
async def running_slot(
    known: dict[str, Any] | None = None, *, orders: Sequence[str] = (), **supervision: float
) -> AsyncIterator[RunningSlot]:
    """A slot at work.

    Args:
        known: fields of its member that another supervisor has left behind.
        orders: for the worker, there before it starts.
        supervision: see make_service.
    """
    with run_folder():
        run, lease = create_run()
        for order in orders:
            (run.path / order).touch()
        running = RunningSlot(run, known or {}, supervision)
        task = asyncio.create_task(running.slot.run())
        try:
            yield running
        finally:
            running.slot.leave(drain_timeout_s=0.0)
            async with asyncio.timeout(DEADLINE_S):
                await task
            lease.release()


async def test_a_hanging_loop_stays_busy_until_it_has_ended() -> None:
    async with running_slot(busy_timeout_s=0.5) as running:
        await running.until(lambda member: member.state is WorkerState.READY)
        order = running.run.path / "dp0.hang"
        order.touch()
        await running.until(lambda member: member.incarnation == 2)
        order.unlink()
        assert running.states(1) == [
            WorkerState.STARTING,
            WorkerState.READY,
            WorkerState.BUSY,
            WorkerState.BACKOFF,
        ]
        assert [
            member.reason for member in running.seen if member.state is WorkerState.BACKOFF
        ] == ["busy for too long"]


async def test_a_stopped_process_is_frozen_until_it_has_ended() -> None:
    async with running_slot(freeze_timeout_s=0.5) as running:
        await running.until(lambda member: member.state is WorkerState.READY)
        process = running.slot.member.process
        assert process is not None
        process.kill(signal.SIGSTOP)
        await running.until(lambda member: member.incarnation == 2)
        states = running.states(1)
        assert states[-2:] == [WorkerState.FROZEN, WorkerState.BACKOFF]
        assert {m.reason for m in running.seen if m.state is WorkerState.BACKOFF} == {
            "frozen for too long"
        }


async def test_a_worker_waits_for_room_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # More often than a worker may crash; none of it counts as a crash.
    asked = refuse_processes(monkeypatch, times=5)
    async with running_slot(backoff_max_s=0.01, crash_loop_limit=2) as running:
        await running.until(lambda member: member.state is WorkerState.READY)
        assert len(asked) == 6
        assert (running.slot.member.incarnation, running.slot.member.num_restarts) == (1, 0)
        first = running.seen[0]
        assert first.state is WorkerState.BACKOFF
        assert first.reason == "cannot be started: Resource temporarily unavailable"


async def test_a_worker_that_is_not_ready_in_time_never_counts_as_frozen() -> None:
    async with running_slot(start_timeout_s=0.05, crash_loop_limit=1) as running:
        await running.until(lambda member: member.state is WorkerState.FAILED)
        assert running.states(1) == [WorkerState.STARTING, WorkerState.FAILED]
        assert (
            running.slot.member.reason
            == "not ready after 0.05 s; gives up after 1 crash; next try in 60 s"
        )


async def test_a_worker_that_served_for_a_while_has_left_its_crashes_behind() -> None:
    async with running_slot(crash_loop_limit=2, stable_after_s=0.1) as running:
        for incarnation in (1, 2, 3):
            await running.until(is_stable_as(incarnation))
            process = running.slot.member.process
            assert process is not None
            process.kill(signal.SIGKILL)
        await running.until(is_stable_as(4))
        assert {member.state for member in running.seen} & {WorkerState.FAILED} == set()


def is_stable_as(incarnation: int) -> Callable[[Member], bool]:
    """READY, and no crash counts."""
    return lambda member: (
        (member.state, member.incarnation, member.num_crashes)
        == (WorkerState.READY, incarnation, 0)
    )


async def test_a_failed_worker_is_tried_again_once_in_a_while() -> None:
    crash = ["dp0.crash"]
    async with running_slot(orders=crash, crash_loop_limit=2, failed_retry_s=0.05) as running:
        await running.until(lambda member: member.incarnation == 4)
        states = [member.state for member in running.seen if member.process is None]
        assert states[:3] == [WorkerState.BACKOFF, WorkerState.FAILED, WorkerState.FAILED]
        (running.run.path / "dp0.crash").unlink()
        await running.until(lambda member: member.state is WorkerState.READY)


async def test_a_wrong_configuration_waits_for_a_retry() -> None:
    async with running_slot(orders=["dp0.misfit"], failed_retry_s=0.01) as running:
        await running.until(lambda member: member.state is WorkerState.FAILED)
        await asyncio.sleep(0.1)
        assert running.slot.member.incarnation == 1


@pytest.mark.parametrize("state", [WorkerState.BACKOFF, WorkerState.FAILED])
async def test_the_next_supervisor_waits_before_it_starts_who_crashed(state: WorkerState) -> None:
    known = {"state": state, "num_crashes": 3 if state is WorkerState.FAILED else 2}
    async with running_slot(
        known, failed_retry_s=600.0, backoff_initial_s=600.0, backoff_max_s=600.0
    ) as running:
        await asyncio.sleep(0.1)
        assert running.seen == [], "it was started at once"
        running.slot.retry()
        await running.until(lambda member: member.state is WorkerState.READY)
        assert running.slot.member.num_crashes == 0


async def test_the_next_supervisor_goes_on_counting() -> None:
    known = {"state": WorkerState.BACKOFF, "num_crashes": 2}
    async with running_slot(known, orders=["dp0.crash"], crash_loop_limit=3) as running:
        await running.until(lambda member: member.state is WorkerState.FAILED)
        assert running.slot.member.incarnation == 1
