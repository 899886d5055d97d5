"""The supervisor and its gateway when what they count on fails: state, tasks, room, an end."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Sequence

import pytest

from tests.multiproc.cluster_harness import (
    DEADLINE_S,
    Recorder,
    is_in,
    is_settled,
    make_service,
    pids_of,
    refuse_processes,
    run_folder,
    running_cluster,
)
from xdeepserve.errors import EngineDeadError
from xdeepserve.launch.cluster import Cluster
from xdeepserve.launch.process_identity import ProcessIdentity
from xdeepserve.launch.run_dir import create_run
from xdeepserve.launch.supervisor.__main__ import _supervise
from xdeepserve.launch.supervisor.child import Child
from xdeepserve.launch.supervisor.messages import Member, WorkerState
from xdeepserve.launch.supervisor.supervisor import Supervisor


@pytest.mark.parametrize("damage", [b"", b"{ damaged", None])
async def test_supervisor_without_state_goes_on_with_who_runs(damage: bytes | None) -> None:
    async with running_cluster(attention=1, expert=2) as running:
        await running.cluster.scale({"expert": 3})
        await running.until(is_settled("dp0", "expert0", "expert1", "expert2"))
        before, supervisor = running.membership, running.supervisor_pid
        os.kill(supervisor, signal.SIGSTOP)
        running.cluster.run.state_path.unlink()
        if damage is not None:
            running.cluster.run.state_path.write_bytes(damage)
        os.kill(supervisor, signal.SIGKILL)
        after = await running.until_next_supervisor(supervisor)
        assert (after.counts, pids_of(after)) == (before.counts, pids_of(before))
        # Who follows takes nothing that is older than what it has.
        assert after.epoch > before.epoch
        assert before.placement is not None
        assert after.placement is not None
        assert after.placement.epoch > before.placement.epoch
        assert after.placement.expert == before.placement.expert
        for old, new in zip(before.members, after.members, strict=True):
            assert abs(new.started_at_s - old.started_at_s) < 5
        running.kill("expert2")
        await running.until(is_in("expert2", WorkerState.READY, 2))


async def test_scaled_down_workers_do_not_come_back_without_state() -> None:
    async with running_cluster(attention=1, expert=2) as running:
        await running.cluster.scale({"expert": 1})
        await running.until(is_settled("dp0", "expert0"))
        supervisor = running.supervisor_pid
        os.kill(supervisor, signal.SIGSTOP)
        running.cluster.run.state_path.unlink()
        os.kill(supervisor, signal.SIGKILL)
        after = await running.until_next_supervisor(supervisor)
        assert after.counts == {"attention": 1, "ffn": 0, "expert": 1}


class BrokenListener(Recorder):
    """Fails in a way that nobody has foreseen."""

    async def joined(self, member: Member) -> None:
        raise RuntimeError(f"no idea of {member.name}")


async def test_a_cluster_whose_task_fails_does_not_start() -> None:
    with run_folder():
        cluster = Cluster(make_service(1, 0), BrokenListener())
        with pytest.raises(EngineDeadError, match=r"telling the router failed: .*no idea of dp0"):
            await cluster.start(timeout_s=DEADLINE_S)
        await cluster.stop(drain_timeout_s=0.0)


async def test_the_supervisor_is_started_when_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = refuse_processes(monkeypatch, times=2)
    async with running_cluster(attention=1) as running:
        assert len(asked) == 3
        assert running.member("dp0").state is WorkerState.READY


async def test_a_supervisor_that_hangs_in_its_start_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spawned: list[Child] = []

    def spawn(command: Sequence[str]) -> Child:
        """First one that never opens its socket, with little time; then a real one."""
        is_first = not spawned
        monkeypatch.setattr("xdeepserve.launch.cluster.SILENCE_TIMEOUT_S", 0.08 if is_first else 60)
        spawned.append(start(["sleep", "3600"] if is_first else command))
        return spawned[-1]

    start = Child.spawn
    monkeypatch.setattr(Child, "spawn", spawn)
    async with running_cluster(attention=1):
        first, second = spawned
        assert first.exited.result() == -signal.SIGKILL
        assert not second.exited.done()


async def test_a_worker_that_cannot_be_ended_ends_the_supervisor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("xdeepserve.launch.supervisor.supervisor.END_MARGIN_S", 0.0)
    with run_folder():
        run, lease = create_run()
        service = make_service(1, 0, freeze_timeout_s=0.1, stop_timeout_s=0.01)
        supervisor = Supervisor(run, service)
        supervisor._tasks["dp0"] = hanging = asyncio.create_task(asyncio.Event().wait())
        supervisor.begin_stop(drain_timeout_s=0.0)
        with pytest.raises(EngineDeadError, match="cannot be ended: dp0"):
            await supervisor._background.guard(supervisor._ended)
        hanging.cancel()
        lease.release()


async def test_not_to_be_able_to_watch_the_gateway_is_not_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(process: ProcessIdentity) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with run_folder():
        run, lease = create_run()
        make_service(1, 0).save(run)
        monkeypatch.setattr(ProcessIdentity, "open_pidfd", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            await _supervise(run)
        assert run.state_path.exists()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        monkeypatch.undo()
        run.kill_processes()
        lease.release()
