"""Pinning the workers of a run on this machine, beside those of other runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from xdeepserve import envs
from xdeepserve.launch.cores import Topology, pin_workers, threads_per_worker, wants_pinning
from xdeepserve.launch.deployment import Deployment
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.run_dir import RunDirectory, living_runs
from xdeepserve.launch.supervisor.messages import Membership, SavedState


def pinned(
    workers: Sequence[WorkerSpec],
    run: RunDirectory,
    deployment: Deployment,
    membership: Membership,
) -> tuple[WorkerSpec, ...]:
    """The workers of a plan with cores of their own, where the deployment wants it.

    Args:
        workers: of a plan.
        run: cores of other runs' workers are left to them.
        deployment: as the run was started.
        membership: its workers keep what they have; new ones get what is free.
    """
    if not wants_pinning(deployment):
        return tuple(workers)
    topology = Topology.of_this_machine().without(set(_cores_of_others(run)))
    num_threads = envs.NUM_THREADS.get() or 0
    return pin_workers(
        workers,
        topology,
        threads=threads_per_worker(deployment, topology, num_threads=num_threads),
        pinned={member.name: member.spec.cores for member in membership.members},
    )


def _cores_of_others(run: RunDirectory) -> Iterator[int]:
    """What the other living runs have pinned; a run whose state cannot be read has nothing."""
    for other in living_runs():
        if other.run_id == run.run_id:
            continue
        try:
            state = msgspec.json.decode(other.state_path.read_bytes(), type=SavedState)
        except (OSError, msgspec.DecodeError):
            continue
        for member in state.membership.members:
            yield from member.spec.cores
