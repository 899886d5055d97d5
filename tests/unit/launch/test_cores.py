"""Default pinning: topologies that are made up, cores that are free, workers that come later."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xdeepserve.launch.cores import (
    Topology,
    parse_cores,
    pin_workers,
    threads_per_worker,
    wants_pinning,
)
from xdeepserve.launch.deployment import Deployment
from xdeepserve.launch.deployment_file import parse_deployment
from xdeepserve.launch.plan import ModelShape, resolve

SHAPE = ModelShape(name="moe", num_experts=8, has_ffn=True, num_layers=2, hidden_size=8, top_k=2)


def machine(nodes: int, cores: int, threads: int = 1) -> Topology:
    """Numbered as Linux does: first threads of all cores first, node by node."""
    total = nodes * cores
    return Topology(
        tuple(
            tuple(
                tuple(core + thread * total for thread in range(threads))
                for core in range(node * cores, (node + 1) * cores)
            )
            for node in range(nodes)
        )
    )


def deployment(attention: int, ffn: int, expert: int, more: str = "") -> Deployment:
    text = (
        f"roles: {{attention: {{count: {attention}}}, ffn: {{count: {ffn}}}, "
        f"expert: {{count: {expert}}}}}\n{more}"
    )
    return parse_deployment(text.encode())


def pin(
    started: Deployment,
    topology: Topology,
    *,
    now: Deployment | None = None,
    pinned: dict[str, tuple[int, ...]] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Cores by worker."""
    workers = resolve(now or started, SHAPE, usable_cores=()).workers
    threads = threads_per_worker(started, topology)
    specs = pin_workers(workers, topology, threads=threads, pinned=pinned or {})
    assert [spec.name for spec in specs] == [worker.name for worker in workers]
    return {spec.name: spec.cores for spec in specs}


def test_each_worker_has_cores_of_its_own_and_neighbours_share_a_node() -> None:
    assert pin(deployment(2, 1, 2), machine(nodes=2, cores=8)) == {
        "dp0": (0, 1, 2),
        "ffn0": (3, 4, 5),
        "expert0": (8, 9, 10),
        "dp1": (11, 12, 13),
        "expert1": (6, 7, 14),  # no node has three left
    }


def test_second_threads_of_cores_are_left_alone_while_there_are_others() -> None:
    cores = pin(deployment(1, 0, 1), machine(nodes=1, cores=4, threads=2))
    assert cores == {"dp0": (0, 1), "expert0": (2, 3)}
    three = deployment(1, 0, 1, "precision: {num_threads: 3}")
    assert pin(three, machine(nodes=1, cores=4, threads=2)) == {
        "dp0": (0, 1, 2),
        "expert0": (3, 4, 7),  # all of the core that is free, then second threads
    }
    assert pin(deployment(1, 0, 1), machine(nodes=1, cores=1, threads=2)) == {
        "dp0": (0,),
        "expert0": (1,),
    }


@pytest.mark.parametrize(
    "more", ["", "precision: {num_threads: 2}", "precision: {num_threads: 1024}"]
)
def test_with_too_few_cores_nobody_is_pinned(more: str) -> None:
    cores = pin(deployment(2, 1, 2, more), machine(nodes=1, cores=4))
    assert set(cores.values()) == {()}


def test_workers_added_later_get_free_cores_if_there_are_any() -> None:
    started = deployment(1, 0, 1, "precision: {num_threads: 2}")
    topology = machine(nodes=1, cores=6)
    before = pin(started, topology)
    assert before == {"dp0": (0, 1), "expert0": (2, 3)}
    grown = pin(started, topology, now=deployment(1, 0, 3), pinned=before)
    assert grown == before | {"expert1": (4, 5), "expert2": ()}
    shrunk = {name: grown[name] for name in ("dp0", "expert0")}
    assert pin(started, topology, now=deployment(2, 0, 1), pinned=shrunk)["dp1"] == (4, 5)


def test_workers_that_run_unpinned_stay_so() -> None:
    started = deployment(1, 0, 1)
    cores = pin(started, machine(nodes=1, cores=4), pinned={"dp0": (), "expert0": (3,)})
    assert cores == {"dp0": (), "expert0": (3,)}


def test_cores_of_others_are_no_choice() -> None:
    rest = machine(nodes=2, cores=2, threads=2).without({0, 1, 4, 5, 2})
    assert rest.nodes == (((6,), (3, 7)),)
    assert (rest.num_physical, rest.num_cores) == (2, 3)


@pytest.mark.parametrize("role", ["attention", "ffn", "expert"])
def test_who_names_cores_or_says_no_is_obeyed(role: str) -> None:
    assert wants_pinning(Deployment())
    assert not wants_pinning(parse_deployment(b"pin: false"))
    text = f"roles: {{{role}: {{count: 1, cores: [[0]]}}}}"
    assert not wants_pinning(parse_deployment(text.encode()))


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("\n", set()), ("x,2-", set())],
)
def test_lists_of_cores(text: str, cores: set[int]) -> None:
    assert parse_cores(text) == cores


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_topology_is_read_from_the_system(tmp_path: Path) -> None:
    for node, cores in {0: "0-1,4-5", 1: "2-3,6-7", 10: ""}.items():
        write(tmp_path / f"node/node{node}/cpulist", cores)
    for core in range(8):
        siblings = f"{core % 4},{core % 4 + 4}"
        write(tmp_path / f"cpu/cpu{core}/topology/thread_siblings_list", siblings)
    assert Topology.read(tmp_path, range(8)) == machine(nodes=2, cores=2, threads=2)
    assert Topology.read(tmp_path, {1, 5, 6}).nodes == (((1, 5),), ((6,),))


def test_what_the_system_does_not_tell_is_one_node_of_physical_cores(tmp_path: Path) -> None:
    assert Topology.read(tmp_path, {3, 0}).nodes == (((0,), (3,)),)


def test_this_machine_has_the_cores_that_may_be_used() -> None:
    topology = Topology.of_this_machine()
    cores = [core for node in topology.nodes for threads in node for core in threads]
    assert sorted(cores) == sorted(os.sched_getaffinity(0))
