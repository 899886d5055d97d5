"""Pinning the workers of a run on this machine, beside those of other runs."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec

from xdeepserve import envs
from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.launch.cores import Topology, pin_workers, threads_per_worker, wants_pinning
from xdeepserve.launch.deployment import Deployment
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.run_dir import RunDirectory, living_runs
from xdeepserve.launch.supervisor.messages import Membership, SavedState

CHOICE_TIMEOUT_S: Final = 0.2
"""A choice takes milliseconds; who is stuck in one must not keep others from starting."""

_POLL_S: Final = 0.01

logger = logging.getLogger(__name__)


@contextmanager
def choosing_cores(run: RunDirectory, *, timeout_s: float = CHOICE_TIMEOUT_S) -> Iterator[None]:
    """No other run chooses cores within the block, which ends with what was chosen published.

    It locks the folder that the runs are in, so that no file is left. Blocks; after the timeout, or
    where the folder cannot be locked, it goes on without: two runs with a core in common are slow,
    not wrong.

    Args:
        run: whose workers are placed.
        timeout_s: how long to wait for another run.
    """
    descriptor = os.open(run.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor, timeout_s)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, timeout_s: float) -> None:
    deadline_s = SYSTEM_CLOCK.monotonic() + timeout_s
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if SYSTEM_CLOCK.monotonic() < deadline_s:
                time.sleep(_POLL_S)
                continue
            logger.warning("cores are chosen beside another run that chooses for %g s", timeout_s)
        except OSError as exc:  # not every file system has locks
            logger.warning("cores are chosen without a lock: %s", exc)
        return None


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
