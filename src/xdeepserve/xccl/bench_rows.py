"""Exchanges of rows, a2e + e2a and dispatch + combine, over tokens, hidden size, top-k and ranks.

Experts compute nothing, so that only the way is measured. Where OpenMPI is there, its collectives
stand beside: with the same bytes and nothing else, and with the same work (bench_collectives).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from xdeepserve.xccl.bench_libraries import SAME_BYTES, SAME_WORK
from xdeepserve.xccl.bench_race import Library, library
from xdeepserve.xccl.bench_timing import MIN_ROUNDS, Numbers, rounds_for, timed
from xdeepserve.xccl.bench_workers import (
    JOIN_S,
    STOP,
    WAIT_S,
    Job,
    available_cores,
    ep_step,
    pin_to_core_of,
    routing,
    workers,
)
from xdeepserve.xccl.ep_group import EpGroup
from xdeepserve.xccl.layout import Layout, Tag
from xdeepserve.xccl.port import Port
from xdeepserve.xccl.segments import unlink_all

WORKS = {"expert": "a2e+e2a", "ep": "dispatch+combine"}


@dataclass(frozen=True, slots=True)
class Shape:
    """One point of the grid; `ranks` counts the asking one."""

    tokens: int
    hidden: int
    top_k: int
    ranks: int


def grid(
    work: str, shapes: Sequence[Shape], *, seconds: float, with_openmpi: bool
) -> Iterator[tuple[Shape, Numbers, dict[str, Numbers]]]:
    """Each shape with XCCL's times and OpenMPI's; shapes of as many ranks stand together."""
    for num_ranks in dict.fromkeys(shape.ranks for shape in shapes):
        with ExitStack() as stack:
            peer = None
            if with_openmpi:
                peer = stack.enter_context(library("openmpi", num_ranks))
            for shape in shapes:
                if shape.ranks == num_ranks:
                    times = point(work, shape, seconds)
                    yield shape, times, peer_point(peer, work, shape, times["rounds"])


def job_of(work: str, rank: int, shape: Shape) -> Job:
    """What one rank does at a point."""
    layout = Layout.for_rows(
        max_ranks=shape.ranks,
        max_rows=shape.tokens,
        hidden_size=shape.hidden,
        top_k=shape.top_k,
        row_slots=2,
    )
    ranks = tuple(range(shape.ranks))
    return Job(work, rank, ranks, layout, shape.tokens, shape.hidden, shape.top_k)


def point(work: str, shape: Shape, seconds: float) -> Numbers:
    """XCCL's times at one point, as rank 0 sees them."""
    jobs = [job_of(work, rank, shape) for rank in range(shape.ranks)]
    with mesh(jobs[1:], jobs[0].layout) as port:
        measure = ep_times if work == "ep" else a2e_times
        return measure(port, jobs[0], seconds)


@contextmanager
def mesh(jobs: Sequence[Job], layout: Layout) -> Iterator[Port]:
    """Rank 0 of a run whose other ranks do the jobs."""
    run_id = f"bench{os.getpid()}"
    try:
        with workers(run_id, jobs), Port(run_id, "r0", 0, layout=layout) as port:
            pin_to_core_of(0)  # after the workers' start: they would inherit it
            port.wait_linked([job.rank for job in jobs], JOIN_S)
            yield port
    finally:
        unlink_all(run_id)
        os.sched_setaffinity(0, available_cores())


def a2e_times(port: Port, job: Job, seconds: float) -> Numbers:
    """One asker, the other ranks are experts: rows out, one answer per pair back, combined."""
    hidden, ids, weights, expert_rank = routing(job, 0)
    out = np.empty_like(hidden)

    def call() -> None:
        exchange = port.a2e(
            tag=Tag(1, 0, 0, 0), hidden_states=hidden, topk_ids=ids, expert_rank=expert_rank
        )
        exchange.wait(WAIT_S)
        exchange.combine(weights, out)
        exchange.release()

    times = timed(call, rounds_for(call, seconds))
    with port.exchange(hidden[:1]) as last:
        for rank in job.ranks[1:]:
            last.add(rank, tag=Tag(2, 0, 0, 0), kind=STOP)
        last.wait(WAIT_S)
    return times


def ep_times(port: Port, job: Job, seconds: float) -> Numbers:
    """All ranks are attention and experts: a collective dispatch and combine."""
    group = EpGroup(port, job.ranks)
    made = routing(job, 0)
    done = 0

    def announce_steps(total: int) -> None:
        for rank in job.ranks[1:]:
            port.signal(rank, 0, total)

    def call() -> None:
        nonlocal done
        ep_step(port, group, job, done, made)
        done += 1

    announce_steps(MIN_ROUNDS)
    rounds = rounds_for(call, seconds)
    announce_steps(MIN_ROUNDS + rounds)
    times = timed(call, rounds)
    announce_steps(1 << 62)
    return times


def peer_point(peer: Library | None, work: str, shape: Shape, rounds: int) -> dict[str, Numbers]:
    """OpenMPI with the same bytes between the ranks and with the same work; as many rounds."""
    if peer is None:
        return {}
    sizes = (shape.tokens, shape.hidden, shape.top_k)
    return {
        SAME_BYTES: peer.collective(SAME_BYTES, work, bytes_per_rank(work, shape), rounds),
        SAME_WORK: peer.collective(SAME_WORK, work, sizes, rounds),
    }


def bytes_per_rank(work: str, shape: Shape) -> tuple[int, int]:
    """Mean bytes from rank 0 to each rank that owns experts: rows there, answers back."""
    job = job_of(work, 0, shape)
    _, ids, _, expert_rank = routing(job, 0)
    owners = expert_rank[ids]
    rows = sum(len(np.unique(row)) for row in owners)
    num_owners = len(np.unique(expert_rank))
    row_bytes = 4 * shape.hidden
    return rows * row_bytes // num_owners, ids.size * row_bytes // num_owners
