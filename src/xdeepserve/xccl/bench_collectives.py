"""What OpenMPI's ranks do beside XCCL's exchanges of rows: the same bytes, and the same work.

The same bytes: equal parts between all ranks and nothing else, so a bound for any program over
MPI. The same work: what one writes with NumPy over MPI: sort pairs by expert, pick each rank's rows
once, tell counts, move rows, pairs and answers, add the answers up by weight. Experts compute
nothing, there or here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from xdeepserve.xccl.batch import F32, I32, Array
from xdeepserve.xccl.bench_workers import Job, routing
from xdeepserve.xccl.layout import Layout

Step = Callable[[], None]


def same_bytes_step(work: str, there: int, back: int) -> Step:
    """Both ways of an exchange, as many bytes between rank 0 and every other one (or all pairs)."""
    mpi: Any = importlib.import_module("mpi4py.MPI")
    world = mpi.COMM_WORLD
    whole = [np.zeros((2, world.size, size), np.uint8) for size in (there, back)]

    def expert() -> None:
        is_root = world.rank == 0
        rows, answers = whole[0][0], whole[1][0]
        world.Scatter(rows if is_root else None, mpi.IN_PLACE if is_root else rows[0], root=0)
        world.Gather(mpi.IN_PLACE if is_root else answers[0], answers if is_root else None, root=0)

    def ep() -> None:
        for buffers in whole:
            world.Alltoall(buffers[0], buffers[1])

    return {"expert": expert, "ep": ep}[work]


@dataclass(frozen=True, slots=True)
class Plan:
    """Who gets which rows: `rows` [R] and `pairs` [P, 2] by rank, `slots` [P] of the pairs."""

    rows: I32
    pairs: I32
    slots: Array
    counts: I32


def plan(ids: I32, expert_rank: I32, num_ranks: int) -> Plan:
    """Pairs sorted by expert, and so by rank; each rank's rows once. Counts [ranks, 2]."""
    num_tokens, top_k = ids.shape
    flat = ids.ravel()
    slots = np.argsort(flat, kind="stable")
    experts = flat[slots]
    owners = expert_rank[experts]
    keys = owners * num_tokens + slots // top_k
    rows, index = np.unique(keys, return_inverse=True)
    counts = np.empty((num_ranks, 2), np.int32)
    counts[:, 0] = np.bincount(rows // num_tokens, minlength=num_ranks)
    counts[:, 1] = np.bincount(owners, minlength=num_ranks)
    starts = np.cumsum(counts[:, 0]) - counts[:, 0]
    pairs = np.empty((len(slots), 2), np.int32)
    pairs[:, 0] = index - starts[owners]
    pairs[:, 1] = experts
    return Plan(rows % num_tokens, pairs, slots, counts)


def add_up(answers: F32, slots: Array, weights: F32) -> F32:
    """[T, H]: sum over k ascending of weight times answer, from 0."""
    num_tokens, top_k = weights.shape
    by_slot = np.empty(len(slots), np.int64)
    by_slot[slots] = np.arange(len(slots))
    index = by_slot.reshape(num_tokens, top_k)
    out = np.zeros((num_tokens, answers.shape[1]), np.float32)
    for k in range(top_k):
        out += weights[:, k, None] * answers[index[:, k]]
    return out


def same_work_step(work: str, rank: int, num_ranks: int, sizes: tuple[int, int, int]) -> Step:
    """One exchange of tokens x hidden, top-k by this rank; buffers are made once."""
    tokens, hidden, top_k = sizes
    layout = Layout()
    job = Job(work, rank, tuple(range(num_ranks)), layout, tokens, hidden, top_k)
    world: Any = importlib.import_module("mpi4py.MPI").COMM_WORLD
    states, ids, weights, expert_rank = routing(job, rank)
    most = tokens * (num_ranks if work == "ep" else 1)
    rows = np.zeros((most, hidden), np.float32)
    pairs = np.zeros((most * top_k, 2), np.int32)
    answers = np.zeros((most * top_k, hidden), np.float32)
    back = np.zeros((tokens * top_k, hidden), np.float32)
    theirs = np.zeros((num_ranks, 2), np.int32)

    def ep() -> None:
        mine = plan(ids, expert_rank, num_ranks)
        world.Alltoall(mine.counts, theirs)
        sent, taken = mine.counts, theirs
        world.Alltoallv([states[mine.rows], sent[:, 0] * hidden], [rows, taken[:, 0] * hidden])
        world.Alltoallv([mine.pairs, sent[:, 1] * 2], [pairs, taken[:, 1] * 2])
        world.Alltoallv([answers, taken[:, 1] * hidden], [back, sent[:, 1] * hidden])
        add_up(back, mine.slots, weights)

    def expert() -> None:
        if rank == 0:
            mine = plan(ids, expert_rank, num_ranks)
            world.Scatter(mine.counts, theirs[0], root=0)
            world.Scatterv([states[mine.rows], mine.counts[:, 0] * hidden], [rows, 0], root=0)
            world.Scatterv([mine.pairs, mine.counts[:, 1] * 2], [pairs, 0], root=0)
            world.Gatherv([answers, 0], [back, mine.counts[:, 1] * hidden], root=0)
            add_up(back, mine.slots, weights)
            return
        world.Scatter(None, theirs[0], root=0)
        num_rows, num_pairs = theirs[0].tolist()
        world.Scatterv(None, [rows, num_rows * hidden], root=0)
        world.Scatterv(None, [pairs, num_pairs * 2], root=0)
        world.Gatherv([answers, num_pairs * hidden], None, root=0)

    return {"expert": expert, "ep": ep}[work]
