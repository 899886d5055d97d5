"""What `xds doctor` says of huge pages and NUMA nodes, with advice where there is some."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from xdeepserve.launch.cores import Topology

THP_FOLDER: Final = Path("/sys/kernel/mm/transparent_hugepage")

ANONYMOUS_ADVICE: Final = (
    f"the KV cache cannot use huge pages; `echo madvise > {THP_FOLDER}/enabled` as root lets it"
)
SHMEM_ADVICE: Final = (
    "packed weights on a tmpfs stay in small pages; where XDEEPSERVE_HOME is on one, mount it with "
    "huge=advise"
)
NODES_ADVICE: Final = (
    "packed weights lie on the node that first reads them; before serving, "
    "`numactl --interleave=all cat FILES > /dev/null` spreads them"
)


def thp_mode(text: str) -> str:
    """The mode in brackets, as in "always [madvise] never"; "" if there is none."""
    found = re.search(r"\[(\w+)\]", text)
    return "" if found is None else found.group(1)


def memory_facts(folder: Path, topology: Topology) -> Iterator[tuple[str, str]]:
    """(name, value) of each fact; advice is a fact of the name "advice".

    Args:
        folder: like THP_FOLDER; a kernel without huge pages has none.
        topology: the cores that may be used.
    """
    anonymous, shmem = _mode(folder / "enabled"), _mode(folder / "shmem_enabled")
    yield "huge pages, anonymous", anonymous or "not known to this kernel"
    if anonymous == "never":
        yield "advice", ANONYMOUS_ADVICE
    yield "huge pages, shmem", shmem or "not known to this kernel"
    if shmem in ("never", "deny"):
        yield "advice", SHMEM_ADVICE
    nodes = [",".join(str(t) for core in node for t in core) for node in topology.nodes]
    cores = "; ".join(f"cores {node}" for node in nodes)
    yield "NUMA nodes", f"{len(nodes)} ({cores}); {topology.num_physical} physical cores"
    if len(nodes) > 1:
        yield "advice", NODES_ADVICE


def _mode(path: Path) -> str:
    try:
        return thp_mode(path.read_text("ascii", "replace"))
    except OSError:
        return ""
