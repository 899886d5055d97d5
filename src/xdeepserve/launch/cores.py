"""Which cores each worker runs on when nobody says: packed by NUMA node, physical cores first.

    Topology (this machine, or made up in a test) --+
    threads of a worker (`threads_per_worker`) -----+--> pin_workers --> specs with cores
    workers that run already keep their cores ------+

A worker's cores are of one node if they fit into one, and ranks fill the nodes in turn: dp0, ffn0
and expert0 are neighbours. Pure, but for reading the topology.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

import msgspec

from xdeepserve.launch.deployment import ROLES, Deployment
from xdeepserve.launch.plan import WorkerSpec

SYSTEM: Final = Path("/sys/devices/system")
NODE_NAME: Final = re.compile(r"node(\d+)")


@dataclass(frozen=True, slots=True)
class Topology:
    """The cores that may be used, as hardware has arranged them.

    Attributes:
        nodes: of each NUMA node its physical cores, of each of these its hardware threads, as
            numbers that sched_setaffinity takes. No empty ones.
    """

    nodes: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def of_this_machine(cls, root: Path = SYSTEM) -> Topology:
        """As /sys says, without what sched_getaffinity does not allow.

        Cores that /sys does not tell about count as physical ones of one node.
        """
        return cls.read(root, os.sched_getaffinity(0))

    @classmethod
    def read(cls, root: Path, allowed: Collection[int]) -> Topology:
        """From a folder like /sys/devices/system, the allowed cores only."""
        rest = set(allowed)
        nodes = []
        for folder in sorted(root.glob("node/node*"), key=_node_number):
            members = parse_cores(_text(folder / "cpulist")) & rest
            rest -= members
            nodes.append(_physical_cores(root, members))
        nodes.append(_physical_cores(root, rest))
        return cls(tuple(node for node in nodes if node))

    def without(self, cores: Collection[int]) -> Topology:
        """The other cores."""
        nodes = (
            tuple(left for threads in node if (left := tuple(t for t in threads if t not in cores)))
            for node in self.nodes
        )
        return Topology(tuple(node for node in nodes if node))

    @property
    def num_physical(self) -> int:
        """Physical cores of which at least one hardware thread may be used."""
        return sum(map(len, self.nodes))

    @property
    def num_cores(self) -> int:
        """Hardware threads that may be used."""
        return sum(len(threads) for node in self.nodes for threads in node)


def parse_cores(text: str) -> set[int]:
    """A list as /sys writes it: "0-3,8" -> {0, 1, 2, 3, 8}; what is none counts as empty."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        if (found := re.fullmatch(r"(\d+)(?:-(\d+))?", part)) is not None:
            first, last = found.groups()
            cores.update(range(int(first), int(last or first) + 1))
    return cores


def _node_number(folder: Path) -> int:
    named = NODE_NAME.fullmatch(folder.name)
    return -1 if named is None else int(named.group(1))


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""


def _physical_cores(root: Path, members: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """The members grouped by physical core."""
    rest = set(members)
    cores = []
    for core in sorted(rest):
        if core in rest:
            siblings = parse_cores(_text(root / f"cpu/cpu{core}/topology/thread_siblings_list"))
            threads = tuple(sorted(rest & (siblings | {core})))
            rest.difference_update(threads)
            cores.append(threads)
    return tuple(cores)


def wants_pinning(deployment: Deployment) -> bool:
    """Whether cores are ours to choose: `pin` is set, and no role names any."""
    return deployment.pin and not any(deployment.role(role).cores for role in ROLES)


def threads_per_worker(deployment: Deployment, topology: Topology, *, num_threads: int = 0) -> int:
    """How many cores each worker of a run is to have for itself; 0 = there are too few.

    Args:
        deployment: with the counts that the run was started with.
        topology: the cores to choose from.
        num_threads: operator threads of a worker where the deployment does not say; 0 = an even
            share of the physical cores, or of all hardware threads if that is none.
    """
    num_workers = sum(deployment.counts().values())
    share = topology.num_physical // num_workers or topology.num_cores // num_workers
    threads = deployment.precision.num_threads or num_threads or share
    return threads if threads * num_workers <= topology.num_cores else 0


def pin_workers(
    workers: Sequence[WorkerSpec],
    topology: Topology,
    *,
    threads: int,
    pinned: Mapping[str, tuple[int, ...]],
) -> tuple[WorkerSpec, ...]:
    """The workers with cores of their own, as far as there are enough.

    Args:
        workers: of a plan, without cores.
        topology: the cores to choose from.
        threads: cores of each new worker; 0 = new ones are not pinned.
        pinned: cores of the workers that there are already, by name; they stay as they are.
    """
    cores = dict(pinned)
    taken = set().union(*cores.values())
    # Neighbours are those of equal rank, not those of equal role.
    for worker in sorted(workers, key=lambda worker: (worker.rank, ROLES.index(worker.role))):
        if threads and worker.name not in cores:
            cores[worker.name] = _choose(topology, taken, threads)
            taken.update(cores[worker.name])
    return tuple(
        msgspec.structs.replace(worker, cores=cores.get(worker.name, ())) for worker in workers
    )


def _choose(topology: Topology, taken: Collection[int], threads: int) -> tuple[int, ...]:
    """Free cores: physical ones of one node, else of several, else any likewise; () = none."""
    for by_node in (_free_physical(topology, taken), _free(topology, taken)):
        fullest_first = sorted(by_node, key=len, reverse=True)
        one_node = next((node for node in by_node if len(node) >= threads), None)
        cores = list(chain.from_iterable(fullest_first)) if one_node is None else one_node
        if len(cores) >= threads:
            return tuple(sorted(cores[:threads]))
    return ()


def _free_physical(topology: Topology, taken: Collection[int]) -> list[list[int]]:
    """By node: the first thread of each physical core that nobody has a part of."""
    return [
        [threads[0] for threads in node if not set(threads) & set(taken)] for node in topology.nodes
    ]


def _free(topology: Topology, taken: Collection[int]) -> list[list[int]]:
    """By node: all threads that nobody has, those of untouched physical cores first."""
    return [
        [
            core
            for threads in sorted(node, key=lambda threads: bool(set(threads) & set(taken)))
            for core in threads
            if core not in taken
        ]
        for node in topology.nodes
    ]
