"""One rank of a library in the race: XCCL, OpenMPI, ZeroMQ or gloo, each in its fastest Python way.

Ranks 2i and 2i + 1 are a pair and play ping-pong; the even one times it. A rank reads what to do
from a FIFO, where it sleeps between points: a library that spins while it waits would slow the
others down. `python -m xdeepserve.xccl.bench_libraries NAME FOLDER NUM_RANKS [RANK]`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xdeepserve.xccl.batch import Array
from xdeepserve.xccl.bench_collectives import Step, same_bytes_step, same_work_step
from xdeepserve.xccl.bench_timing import MIN_ROUNDS, Numbers, rounds_for, timed
from xdeepserve.xccl.bench_workers import JOIN_S, WAIT_S, pin_to_core_of
from xdeepserve.xccl.layout import Layout
from xdeepserve.xccl.port import Port

Call = Callable[[Array], None]

PING_PONG, SAME_BYTES, SAME_WORK = "ping_pong", "same_bytes", "same_work"
"""Works that a rank is told to do."""

RESULTS = "results"
"""FIFO on which ranks that time something report."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands: its number, the ranks in all, the folder of the run."""

    rank: int
    num_ranks: int
    folder: Path

    @property
    def partner(self) -> int:
        return self.rank ^ 1


@dataclass(frozen=True, slots=True)
class Verbs:
    """What a library can do."""

    send: Call
    recv: Call


def connect_xccl(place: Place) -> Verbs:
    """A port whose segment has room for messages only."""
    layout = Layout(max_ranks=place.num_ranks, request_bytes=64, reply_bytes=64)
    run_id = place.folder.name.replace("-", "_")
    port = Port(run_id, f"r{place.rank}", place.rank, layout=layout)
    port.wait_linked([place.partner], JOIN_S)
    partner = place.partner

    def send(data: Array) -> None:
        port.send(partner, data, 0, WAIT_S)

    def recv(data: Array) -> None:
        port.recv(partner, data, WAIT_S)

    return Verbs(send, recv)


def connect_openmpi(place: Place) -> Verbs:
    """mpi4py's upper-case verbs: NumPy buffers, no pickle."""
    world: Any = importlib.import_module("mpi4py.MPI").COMM_WORLD
    partner = place.partner

    def send(data: Array) -> None:
        world.Send(data, dest=partner)

    def recv(data: Array) -> None:
        world.Recv(data, source=partner)

    return Verbs(send, recv)


def connect_zeromq(place: Place) -> Verbs:
    """A PAIR socket over ipc."""
    zmq: Any = importlib.import_module("zmq")
    socket = zmq.Context.instance().socket(zmq.PAIR)
    address = f"ipc://{place.folder}/pair{place.rank // 2}"
    _ = socket.connect(address) if place.rank % 2 else socket.bind(address)

    def send(data: Array) -> None:
        socket.send(data, copy=len(data) <= COPY_BELOW)

    def recv(data: Array) -> None:
        message = socket.recv(copy=len(data) <= COPY_BELOW)
        data[:] = np.frombuffer(message, np.uint8)

    return Verbs(send, recv)


COPY_BELOW = 64 << 10
"""pyzmq's own default: below it a copy is cheaper than the bookkeeping of a shared buffer."""


def connect_gloo(place: Place) -> Verbs:
    """torch.distributed on tensors that share the arrays' memory."""
    torch: Any = importlib.import_module("torch")
    distributed: Any = importlib.import_module("torch.distributed")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{place.folder}/rendezvous",
        rank=place.rank,
        world_size=place.num_ranks,
    )
    partner = place.partner

    def send(data: Array) -> None:
        distributed.send(torch.from_numpy(data), partner)

    def recv(data: Array) -> None:
        distributed.recv(torch.from_numpy(data), partner)

    return Verbs(send, recv)


CONNECT = {
    "xccl": connect_xccl,
    "openmpi": connect_openmpi,
    "zeromq": connect_zeromq,
    "gloo": connect_gloo,
}

PINNED = ("xccl", "openmpi")
"""Libraries without threads of their own. The others' threads need the other core, too."""


def ping_pong(place: Place, verbs: Verbs, size: int, seconds: float) -> Numbers | None:
    """Round trips of `size` bytes with the partner; the even rank's times, in microseconds."""
    data, count = np.ones(size, np.uint8), np.zeros(1, np.int64)
    send, recv = verbs.send, verbs.recv
    if place.rank % 2:
        for _ in range(2):  # the warm-up, then what the other side makes of it
            recv(count.view(np.uint8))
            for _ in range(int(count[0])):
                recv(data)
                send(data)
        return None

    def call() -> None:
        send(data)
        recv(data)

    count[0] = MIN_ROUNDS
    send(count.view(np.uint8))
    count[0] = rounds_for(call, seconds)
    send(count.view(np.uint8))
    began_ns = time.monotonic_ns()
    times = timed(call, int(count[0]))
    return {**times, "began_ns": began_ns, "ended_ns": time.monotonic_ns()}


def collective(place: Place, step: Step, rounds: int) -> Numbers | None:
    """Exchanges of rows by OpenMPI; rank 0's times."""
    for _ in range(MIN_ROUNDS):
        step()
    times = timed(step, rounds)
    return times if place.rank == 0 else None


def step_of(place: Place, work: str, kind: str, sizes: Sequence[int]) -> Step:
    """What is timed: `sizes` are bytes there and back, or tokens, hidden size and top-k."""
    if work == SAME_BYTES:
        there, back = sizes
        return same_bytes_step(kind, there, back)
    tokens, hidden, top_k = sizes
    return same_work_step(kind, place.rank, place.num_ranks, (tokens, hidden, top_k))


def serve(place: Place, verbs: Verbs) -> None:
    """Does what the lines of this rank's FIFO say, until it is closed."""
    with (
        (place.folder / f"rank{place.rank}").open() as orders,
        (place.folder / RESULTS).open("w") as results,
    ):
        results.write("{}\n")  # connected
        results.flush()
        for line in orders:
            work, *rest = json.loads(line)
            if work == PING_PONG:
                times = ping_pong(place, verbs, *rest)
            else:
                kind, sizes, rounds = rest
                times = collective(place, step_of(place, work, kind, sizes), rounds)
            if times is not None:
                results.write(json.dumps(times) + "\n")
                results.flush()


def main() -> None:
    """Entry of a rank's process."""
    name, folder, num_ranks, *rest = sys.argv[1:]
    rank = int(rest[0] if rest else os.environ["OMPI_COMM_WORLD_RANK"])
    if name in PINNED:
        pin_to_core_of(rank)
    place = Place(rank, int(num_ranks), Path(folder))
    serve(place, CONNECT[name](place))


if __name__ == "__main__":
    main()
