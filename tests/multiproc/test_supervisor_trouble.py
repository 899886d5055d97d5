"""The supervisor and its gateway when what they count on fails: state, tasks, room, an end."""

from __future__ import annotations

import asyncio
import errno

import pytest

from tests.multiproc.cluster_harness import (
    DEADLINE_S,
    Recorder,
    make_service,
    refuse_processes,
    run_folder,
    running_cluster,
)
from xdeepserve.errors import EngineDeadError
from xdeepserve.launch.cluster import Cluster
from xdeepserve.launch.process_identity import ProcessIdentity
from xdeepserve.launch.run_dir import create_run
from xdeepserve.launch.supervisor.__main__ import _supervise
from xdeepserve.launch.supervisor.messages import Member, WorkerState
from xdeepserve.launch.supervisor.supervisor import Supervisor


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
