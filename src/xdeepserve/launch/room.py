"""Room: what the exchanges of a run need of /dev/shm and memory, against what is left there.

Segments are sparse: a slot costs memory once a message has been in it. Two things are checked
before any worker starts, because a worker that writes to a full /dev/shm is killed:

    one segment, with all places of workers that may join   <= what /dev/shm has left
    all slots between the DP groups and workers of the start <= what /dev/shm and memory have left

The second is an upper bound: every slot filled by the largest step. Workers that scaling adds are
not in it; each of them asks again for the room of its own segment.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from xdeepserve.errors import ConfigError
from xdeepserve.launch.deployment import Deployment
from xdeepserve.launch.fabric import is_taken_apart, layout_of
from xdeepserve.launch.plan import ModelShape
from xdeepserve.launch.run_dir import SHM_FOLDER
from xdeepserve.xccl import Layout


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that are left.

    Attributes:
        shm_bytes: in /dev/shm.
        memory_bytes: that can be had without swapping.
    """

    shm_bytes: int
    memory_bytes: int

    @classmethod
    def of_this_machine(cls) -> Room:
        """What is left now; in a container, what its memory limit allows at most."""
        info = os.statvfs(SHM_FOLDER)
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                memory_bytes = int(line.split()[1]) << 10
        with contextlib.suppress(OSError, ValueError):  # No control group, or no limit ("max").
            limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
            memory_bytes = min(memory_bytes, limit)
        return cls(info.f_bavail * info.f_frsize, memory_bytes)


def check_room(deployment: Deployment, shape: ModelShape, room: Room) -> None:
    """Whether the segments of a run can be made and filled.

    Raises:
        ConfigError: a step does not fit the limits of a segment, or the room.
    """
    if not is_taken_apart(deployment):
        return
    layout = layout_of(deployment, shape)
    _check(
        f"each worker's segment, with places for {layout.max_ranks} workers,",
        layout.segment_bytes,
        {"/dev/shm": room.shm_bytes},
        deployment,
    )
    counts = deployment.counts()
    num_pairs = counts["attention"] * (counts["ffn"] + counts["expert"])
    _check(
        f"the exchange of steps between {num_pairs} pairs of workers",
        num_pairs * pair_bytes(layout),
        {"/dev/shm": room.shm_bytes, "memory": room.memory_bytes},
        deployment,
    )


def pair_bytes(layout: Layout) -> int:
    """What a DP group and one FFN or expert worker can fill: their requests and replies."""
    return layout.row_slots * (layout.request_bytes + layout.reply_bytes)


def _check(what: str, num_bytes: int, left: dict[str, int], deployment: Deployment) -> None:
    for where, left_bytes in left.items():
        if num_bytes > left_bytes:
            raise ConfigError(
                f"{what} may take {_mib(num_bytes)}, but {where} has {_mib(left_bytes)} left; make "
                f"it larger, or lower "
                f"limits.max_num_batched_tokens={deployment.limits.max_num_batched_tokens} or "
                "the roles' count or max_count"
            )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
