"""Drives the libraries of a race: starts their ranks, gives each its turn, collects the times.

All contenders of a point run one after the other, every point several times, so that a change of
the machine's mood hits all alike; the middle result counts. Peers are optional, never a dependency.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from xdeepserve.errors import XcclError
from xdeepserve.xccl.bench_libraries import PING_PONG, RESULTS
from xdeepserve.xccl.bench_timing import Numbers
from xdeepserve.xccl.bench_workers import available_cores
from xdeepserve.xccl.segments import unlink_all

NEEDS = {"openmpi": "mpi4py", "zeromq": "zmq", "gloo": "torch"}
LIMIT_S = 60.0
MODULE = "xdeepserve.xccl.bench_libraries"


def missing_peers() -> dict[str, str]:
    """Peers that cannot run here, and why."""
    missing = {
        name: f"{module} is not installed"
        for name, module in NEEDS.items()
        if importlib.util.find_spec(module) is None
    }
    if shutil.which("mpirun") is None:
        missing["openmpi"] = "mpirun is not installed"
    return missing


class Library:
    """The running ranks of one library. Owns their processes and FIFOs."""

    def __init__(self, name: str, num_ranks: int, folder: Path) -> None:
        self.name = name
        self.num_ranks = num_ranks
        self._folder = folder
        self._buffer = b""
        for fifo in (RESULTS, *(f"rank{rank}" for rank in range(num_ranks))):
            os.mkfifo(folder / fifo)
        self._orders = [self._open(f"rank{rank}") for rank in range(num_ranks)]
        self._results = self._open(RESULTS)
        self._log = (folder / "log").open("wb")
        self._processes = [self._start(command) for command in self._commands()]

    def _open(self, fifo: str) -> int:
        return os.open(self._folder / fifo, os.O_RDWR)  # both ends: opening never blocks

    def _commands(self) -> list[list[str]]:
        command = [sys.executable, "-m", MODULE, self.name, str(self._folder), str(self.num_ranks)]
        if self.name != "openmpi":
            return [[*command, str(rank)] for rank in range(self.num_ranks)]
        mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        is_crowded = self.num_ranks > len(available_cores())
        idle = ["--mca", "mpi_yield_when_idle", "1" if is_crowded else "0"]
        return [[*mpirun, *idle, "-n", str(self.num_ranks), *command]]

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )

    def wait_connected(self) -> None:
        """Raises XcclError when the ranks do not come up."""
        self._collect(self.num_ranks)

    def ping_pong(self, size: int, seconds: float) -> Numbers:
        """Round trips in all pairs at once: middle p50, worst p99, trips of all per second."""
        self._order([PING_PONG, size, seconds])
        times = self._collect(self.num_ranks // 2)
        taken_ns = max(t["ended_ns"] for t in times) - min(t["began_ns"] for t in times)
        return {
            "p50": statistics.median(t["p50"] for t in times),
            "p99": max(t["p99"] for t in times),
            "trips_per_s": round(sum(t["rounds"] for t in times) * 1e9 / taken_ns),
        }

    def collective(self, work: str, kind: str, sizes: Sequence[int], rounds: int) -> Numbers:
        """Exchanges of rows of the kind "expert" or "ep": SAME_BYTES or SAME_WORK."""
        self._order([work, kind, sizes, rounds])
        return self._collect(1)[0]

    def _order(self, work: list[object]) -> None:
        for orders in self._orders:
            os.write(orders, json.dumps(work).encode() + b"\n")

    def _collect(self, count: int) -> list[Numbers]:
        deadline = time.monotonic() + LIMIT_S
        while self._buffer.count(b"\n") < count:
            if select.select([self._results], [], [], 0.2)[0]:
                self._buffer += os.read(self._results, 1 << 16)
            elif time.monotonic() > deadline or any(p.poll() for p in self._processes):
                raise XcclError(f"{self.name}: no result ({self._complaint()})")
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines]

    def _complaint(self) -> str:
        lines = (self._folder / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"silent for {LIMIT_S:g} s"

    def __enter__(self) -> Library:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in (*self._orders, self._results):
            os.close(fd)
        for process in self._processes:
            process.terminate()  # mpirun passes it on to its ranks
        for process in self._processes:
            process.wait(LIMIT_S)
        self._log.close()


@contextmanager
def library(name: str, num_ranks: int) -> Iterator[Library]:
    """A library whose ranks are connected.

    Raises:
        XcclError: its ranks do not come up.
    """
    with tempfile.TemporaryDirectory(prefix="xdsrace") as folder:
        try:
            with Library(name, num_ranks, Path(folder)) as running:
                running.wait_connected()
                yield running
        finally:
            unlink_all(Path(folder).name)


def race(
    names: Sequence[str], num_ranks: int, sizes: Sequence[int], *, seconds: float, repeats: int
) -> Iterator[tuple[int, dict[str, Numbers]]]:
    """Ping-pong of every library at every size, in turns: (size, times by library).

    Raises:
        XcclError: a library fails.
    """
    with ExitStack() as stack:
        running = [stack.enter_context(library(name, num_ranks)) for name in names]
        for size in sizes:
            turns = [[r.ping_pong(size, seconds) for r in running] for _ in range(repeats)]
            yield (
                size,
                {
                    contender.name: middle([turn[index] for turn in turns])
                    for index, contender in enumerate(running)
                },
            )


def middle(times: Sequence[Numbers]) -> Numbers:
    """The median of each number over the repeats."""
    return {key: statistics.median(t[key] for t in times) for key in times[0]}
