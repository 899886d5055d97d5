"""The supervisor with real processes: crashes, freezes, its own death, scaling, the end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multiproc.cluster_harness import (
    DEADLINE_S,
    is_in,
    is_settled,
    run_folder,
    running_cluster,
)
from xdeepserve.errors import ConfigError, EngineDeadError
from xdeepserve.launch.cli import main
from xdeepserve.launch.process_identity import ProcessIdentity
from xdeepserve.launch.run_dir import SHM_FOLDER, RunDirectory, clean_dead_runs, dead_runs
from xdeepserve.launch.service import ServiceConfig
from xdeepserve.launch.supervisor.messages import Membership, WorkerState


def expert_ranks(membership: Membership) -> tuple[int, ...]:
    assert membership.placement is not None
    return membership.placement.expert


async def test_start_title_stop() -> None:
    async with running_cluster(attention=2, expert=2) as running:
        members = running.membership.members
        assert [m.name for m in members] == ["dp0", "dp1", "expert0", "expert1"]
        assert [m.spec.experts for m in members] == [None, None, (0, 4), (4, 8)]
        assert sorted(running.events) == [("joined", "dp0", 1), ("joined", "dp1", 1)]
        command = Path(f"/proc/{running.pid('expert1')}/cmdline").read_bytes()
        assert command.rstrip(b"\0") == b"xds:expert1"
        pids = running.pids()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


async def test_killed_worker_is_restarted_and_others_are_not() -> None:
    async with running_cluster(attention=2) as running:
        other = running.pid("dp1")
        running.kill("dp0")
        await running.until(is_in("dp0", WorkerState.READY, 2))
        assert running.member("dp0").num_restarts == 1
        assert running.pid("dp1") == other
        await running.until_told()
        assert sorted(running.events) == [("joined", "dp0", 1), ("joined", "dp1", 1)]


async def test_stopped_worker_is_frozen_then_restarted() -> None:
    async with running_cluster(attention=1, freeze_timeout_s=0.5) as running:
        running.kill("dp0", signal.SIGSTOP)
        await running.until(is_in("dp0", WorkerState.READY, 2))


async def test_worker_that_continues_in_time_is_kept() -> None:
    async with running_cluster(attention=1) as running:
        pid = running.pid("dp0")
        running.kill("dp0", signal.SIGSTOP)
        await running.until(is_in("dp0", WorkerState.FROZEN, 1))
        running.kill("dp0", signal.SIGCONT)
        await running.until(is_in("dp0", WorkerState.READY, 1))
        assert running.pid("dp0") == pid


async def test_loop_that_goes_on_in_time_is_kept() -> None:
    async with running_cluster(attention=1) as running:
        order = running.order("dp0", "hang")
        await running.until(is_in("dp0", WorkerState.BUSY, 1))
        order.unlink()
        await running.until(is_in("dp0", WorkerState.READY, 1))


async def test_hanging_loop_is_restarted() -> None:
    async with running_cluster(attention=1, busy_timeout_s=0.5) as running:
        order = running.order("dp0", "hang")
        await running.until(lambda m: m.members[0].incarnation == 2)
        order.unlink()
        await running.until(lambda m: m.members[0].state is WorkerState.READY)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_workers_outlive_their_supervisor(number: signal.Signals) -> None:
    async with running_cluster(attention=1, expert=2) as running:
        pids, epoch = running.pids(), running.membership.epoch
        supervisor = running.supervisor_pid
        os.kill(supervisor, number)
        await running.until(lambda m: m.epoch > epoch)
        assert running.supervisor_pid != supervisor
        assert running.pids() == pids
        assert {m.state for m in running.membership.members} == {WorkerState.READY}
        assert running.events == [("joined", "dp0", 1)]
        # The new supervisor, which is not their parent, watches them too.
        running.kill("expert1")
        await running.until(is_in("expert1", WorkerState.READY, 2))


async def test_worker_that_dies_while_there_is_no_supervisor() -> None:
    async with running_cluster(attention=1, expert=1) as running:
        supervisor, worker = running.supervisor_pid, running.pid("expert0")
        os.kill(supervisor, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        os.kill(supervisor, signal.SIGKILL)
        await running.until(is_in("expert0", WorkerState.READY, 2))


async def test_scale_up_and_down_with_drain() -> None:
    async with running_cluster(attention=1, expert=1) as running:
        dp0 = running.pid("dp0")
        await running.cluster.scale({"attention": 2, "expert": 3})
        await running.until(is_settled("dp0", "dp1", "expert0", "expert1", "expert2"))
        assert running.member("expert0").spec.experts == (0, 3)
        running.order("dp1", "stubborn")  # drains long enough to be seen
        await running.cluster.scale({"attention": 1, "expert": 1})
        await running.until(is_in("dp1", WorkerState.DRAINING, 1))
        await running.until_told()
        await running.until(is_settled("dp0", "expert0"))
        await running.until_told()
        assert running.pid("dp0") == dp0
        assert running.events[1:] == [
            ("joined", "dp1", 1),
            ("draining", "dp1", 1),
            ("left", "dp1", 1),
        ]
        await running.cluster.scale({"attention": 2})
        await running.until(is_in("dp1", WorkerState.READY, 2))


async def test_draining_worker_that_is_wanted_again() -> None:
    async with running_cluster(attention=2) as running:
        order = running.order("dp1", "stubborn")
        await running.cluster.scale({"attention": 1})
        await running.until(is_in("dp1", WorkerState.DRAINING, 1))
        await running.cluster.scale({"attention": 2})
        order.unlink()
        await running.until(is_in("dp1", WorkerState.READY, 2))


async def test_frozen_worker_is_drained_by_force() -> None:
    async with running_cluster(attention=2, freeze_timeout_s=0.5) as running:
        running.kill("dp1", signal.SIGSTOP)
        await running.cluster.scale({"attention": 1})
        await running.until(is_settled("dp0"))


async def test_scale_while_the_supervisor_is_restarted() -> None:
    async with running_cluster(attention=1, expert=1) as running:
        os.kill(running.supervisor_pid, signal.SIGKILL)
        await running.cluster.scale({"expert": 2})
        await running.until(is_settled("dp0", "expert0", "expert1"))


async def test_worker_stopped_while_it_starts() -> None:
    async with running_cluster(attention=1, freeze_timeout_s=0.5) as running:
        running.kill("dp0")
        await running.until(is_in("dp0", WorkerState.STARTING, 2))
        running.kill("dp0", signal.SIGSTOP)
        await running.until(is_in("dp0", WorkerState.READY, 3))


async def test_scale_refuses_nonsense() -> None:
    async with running_cluster(attention=1, expert=1) as running:
        epoch = running.membership.epoch
        for counts in ({"attention": 0}, {"expert": 9}, {"experts": 1}, {"ffn": -1}):
            with pytest.raises(ConfigError):
                await running.cluster.scale(counts)
        status = await running.cluster.status()
        assert status.membership.epoch == epoch
        assert status.heartbeats["dp0"].load["rounds"] > 0


async def test_the_experts_are_moved_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    async with running_cluster(attention=1, expert=2):
        assert await asyncio.to_thread(main, ["rebalance"]) == 0
        assert capsys.readouterr().out == "the experts stay where they are: placement 0\n"
    async with running_cluster(attention=1):
        assert await asyncio.to_thread(main, ["rebalance"]) == 2
        assert "nothing to rebalance" in capsys.readouterr().err


async def test_a_worker_that_was_killed_and_scaled_away_leaves_no_segment() -> None:
    async with running_cluster(attention=1, expert=2) as running:
        names = ("dp0", "expert1")
        segments = [SHM_FOLDER / f"xds-{running.cluster.run.run_id}-{name}" for name in names]
        for segment in segments:
            segment.touch(mode=0o600)
        await running.cluster.scale({"expert": 1})
        await running.until(is_settled("dp0", "expert0"))
        assert [segment.exists() for segment in segments] == [True, False]


async def test_crash_loop_ends_in_failed_until_scaled() -> None:
    async with running_cluster(attention=1, expert=2) as running:
        order = running.order("expert0", "crash")
        running.kill("expert0")
        await running.until(is_in("expert0", WorkerState.BACKOFF, 2))
        assert expert_ranks(running.membership) == (0, 1)
        await running.until(is_in("expert0", WorkerState.FAILED, 3))
        assert running.member("expert0").reason == (
            "ended with code 1: expert0 was told to crash; gives up after 3 crashes; "
            "next try in 60 s"
        )
        assert running.member("dp0").state is WorkerState.READY
        assert expert_ranks(running.membership) == (1,)
        assert (await running.cluster.status()).num_dropped == 1
        order.unlink()
        scaled = await running.cluster.scale({"expert": 2})
        assert {member.state for member in scaled.members} & {WorkerState.FAILED} == set()
        await running.until(is_in("expert0", WorkerState.READY, 4))
        assert expert_ranks(running.membership) == (0, 1)


async def test_a_wrong_configuration_is_not_tried_again() -> None:
    async with running_cluster(attention=1, expert=1) as running:
        order = running.order("expert0", "misfit")
        running.kill("expert0")
        await running.until(is_in("expert0", WorkerState.FAILED, 2))
        assert running.member("expert0").reason == (
            "ended with code 2: expert0 was told to misfit; gives up, as it would end so again"
        )
        assert expert_ranks(running.membership) == ()
        order.unlink()
        await running.cluster.scale({"expert": 1})
        await running.until(is_in("expert0", WorkerState.READY, 3))
        assert expert_ranks(running.membership) == (0,)


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("crash", "ended with code 1: dp0 was told to crash; gives up after 3 crashes"),
        ("misfit", "ended with code 2: dp0 was told to misfit; gives up"),
    ],
)
async def test_start_fails_when_a_worker_does_not_start(order: str, reason: str) -> None:
    with pytest.raises(EngineDeadError, match=f"dp0 does not start: {reason}"):
        async with running_cluster(attention=1, orders=[f"dp0.{order}"]):
            pass


async def test_the_gateway_knows_why_its_supervisor_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def save_nothing(service: ServiceConfig, run: RunDirectory) -> None:
        run.service_path.write_bytes(b"{}")

    monkeypatch.setattr(ServiceConfig, "save", save_nothing)
    with pytest.raises(EngineDeadError, match=r"does not start: .*service\.json cannot be read"):
        async with running_cluster(attention=1):
            pass


async def test_calls_outlive_a_frozen_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdeepserve.launch.cluster.PING_INTERVAL_S", 0.05)
    monkeypatch.setattr("xdeepserve.launch.cluster.PING_TIMEOUT_S", 0.3)
    async with running_cluster(attention=1, expert=1) as running:
        for _ in range(2):
            frozen = running.supervisor_pid
            os.kill(frozen, signal.SIGSTOP)
            status = await running.cluster.status()
            assert status.supervisor.pid != frozen
        os.kill(running.supervisor_pid, signal.SIGSTOP)
        await running.cluster.scale({"expert": 2})
        await running.until(is_settled("dp0", "expert0", "expert1"))


def start_gateway(
    folder: Path,
) -> tuple[subprocess.Popen[str], RunDirectory, list[ProcessIdentity]]:
    gateway = subprocess.Popen(
        [sys.executable, "-m", "tests.multiproc.gateway_process"], stdout=subprocess.PIPE, text=True
    )
    assert gateway.stdout is not None
    pids = json.loads(gateway.stdout.readline())
    (path,) = folder.iterdir()
    return gateway, RunDirectory.open(path), [ProcessIdentity.of(pid) for pid in pids]


def kill_gateway(gateway: subprocess.Popen[str]) -> None:
    gateway.kill()
    gateway.wait(DEADLINE_S)
    assert gateway.stdout is not None
    gateway.stdout.close()


async def until_dead(processes: list[ProcessIdentity]) -> None:
    loop = asyncio.get_running_loop()
    for process in processes:
        if (pidfd := process.open_pidfd()) is not None:
            dead = asyncio.Event()
            loop.add_reader(pidfd, dead.set)
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await dead.wait()
            finally:
                loop.remove_reader(pidfd)
                os.close(pidfd)


async def test_everything_ends_with_the_gateway() -> None:
    with run_folder() as folder:
        gateway, run, processes = start_gateway(folder)
        segment = SHM_FOLDER / f"xds-{run.run_id}-test"
        segment.touch()
        os.kill(processes[0].pid, signal.SIGSTOP)
        kill_gateway(gateway)
        await until_dead(processes)
        assert not segment.exists()
        assert list(folder.iterdir()) == []


async def test_workers_end_with_the_gateway_also_without_a_supervisor() -> None:
    with run_folder() as folder:
        gateway, run, (dp0, expert0, supervisor) = start_gateway(folder)
        os.kill(gateway.pid, signal.SIGSTOP)  # so that it starts no other supervisor
        os.kill(expert0.pid, signal.SIGSTOP)
        os.kill(supervisor.pid, signal.SIGKILL)
        kill_gateway(gateway)
        await until_dead([dp0, supervisor])
        assert expert0.is_alive()
        assert dead_runs() == clean_dead_runs() == [run]
        await until_dead([expert0])
        assert list(folder.iterdir()) == []
