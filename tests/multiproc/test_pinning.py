"""Workers of a run on cores of their own: at the start, after a crash, after scaling."""

from __future__ import annotations

import os
from dataclasses import replace

import msgspec
import pytest

from tests.multiproc.cluster_harness import (
    DEADLINE_S,
    Recorder,
    RunningCluster,
    make_service,
    run_folder,
    running_cluster,
)
from xdeepserve.launch.cluster import Cluster
from xdeepserve.launch.supervisor.messages import Membership

USABLE = os.sched_getaffinity(0)

needs_two_cores = pytest.mark.skipif(len(USABLE) < 2, reason="two workers need two cores")


def check_affinity(running: RunningCluster) -> dict[str, tuple[int, ...]]:
    """Every process runs where its spec says; no core is given twice. Returns the cores."""
    cores = {member.name: member.spec.cores for member in running.membership.members}
    for name, own in cores.items():
        assert os.sched_getaffinity(running.pid(name)) == (set(own) or USABLE)
    given = [core for own in cores.values() for core in own]
    assert len(given) == len(set(given))
    return cores


@needs_two_cores
async def test_each_worker_has_its_own_cores_in_all_its_lives() -> None:
    async with running_cluster(attention=1, expert=1) as running:
        cores = check_affinity(running)
        assert all(cores.values())
        running.kill("expert0")
        await running.until(lambda m: m.members[1].incarnation == 2 and m.is_settled())
        assert check_affinity(running) == cores


@needs_two_cores
async def test_the_next_supervisor_and_scaling_leave_the_cores_of_others_alone() -> None:
    def is_grown(membership: Membership) -> bool:
        return len(membership.members) == 3 and membership.is_settled()

    async with running_cluster(attention=1, expert=1) as running:
        cores = check_affinity(running)
        former = running.supervisor_pid
        os.kill(former, 9)
        await running.until_next_supervisor(former)
        await running.cluster.scale({"expert": 2})
        await running.until(is_grown)
        grown = check_affinity(running)
        assert cores.items() <= grown.items()


async def test_pinning_can_be_switched_off() -> None:
    service = make_service(1, 1)
    free = msgspec.structs.replace(service, deployment=replace(service.deployment, pin=False))
    recorder = Recorder()
    with run_folder():
        cluster = Cluster(free, recorder)
        try:
            await cluster.start(timeout_s=DEADLINE_S)
            assert set(check_affinity(RunningCluster(cluster, recorder)).values()) == {()}
        finally:
            await cluster.stop(drain_timeout_s=1.0)


@needs_two_cores
async def test_a_second_run_takes_no_core_of_the_first() -> None:
    service = make_service(1, 1)
    async with running_cluster(attention=1, expert=1) as first:
        taken = {core for own in check_affinity(first).values() for core in own}
        recorder = Recorder()
        cluster = Cluster(service, recorder)
        try:
            await cluster.start(timeout_s=DEADLINE_S)
            second = check_affinity(RunningCluster(cluster, recorder))
        finally:
            await cluster.stop(drain_timeout_s=1.0)
    assert taken.isdisjoint(core for own in second.values() for core in own)
