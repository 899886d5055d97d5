"""What `xds doctor` says of memory, for machines that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from xdeepserve.launch.cores import Topology
from xdeepserve.launch.machine_memory import (
    ANONYMOUS_ADVICE,
    NODES_ADVICE,
    SHMEM_ADVICE,
    memory_facts,
    thp_mode,
)

ONE_NODE = Topology((((0, 2), (1, 3)),))
TWO_NODES = Topology((((0,),), ((1,),)))


@pytest.mark.parametrize(
    ("text", "mode"),
    [("always [madvise] never\n", "madvise"), ("[always] never", "always"), ("", ""), ("x", "")],
)
def test_mode(text: str, mode: str) -> None:
    assert thp_mode(text) == mode


@pytest.mark.parametrize(
    ("anonymous", "shmem", "topology", "advice"),
    [
        ("always [madvise] never", "always within_size [advise] never deny force", ONE_NODE, []),
        ("always madvise [never]", "[never]", ONE_NODE, [ANONYMOUS_ADVICE, SHMEM_ADVICE]),
        ("[always]", "never [deny]", TWO_NODES, [SHMEM_ADVICE, NODES_ADVICE]),
    ],
)
def test_advice(
    anonymous: str, shmem: str, topology: Topology, advice: list[str], tmp_path: Path
) -> None:
    (tmp_path / "enabled").write_text(anonymous)
    (tmp_path / "shmem_enabled").write_text(shmem)
    facts = list(memory_facts(tmp_path, topology))
    assert [value for name, value in facts if name == "advice"] == advice


def test_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    assert list(memory_facts(tmp_path, ONE_NODE)) == [
        ("huge pages, anonymous", "not known to this kernel"),
        ("huge pages, shmem", "not known to this kernel"),
        ("NUMA nodes", "1 (cores 0,2,1,3); 2 physical cores"),
    ]
