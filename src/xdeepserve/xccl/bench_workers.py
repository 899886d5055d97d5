"""The other side of the benchmark: processes that echo. `python -m ... RUN_ID`, job on stdin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from xdeepserve.xccl.batch import F32, Batch
from xdeepserve.xccl.ep_group import EpGroup
from xdeepserve.xccl.layout import Layout, Tag
from xdeepserve.xccl.port import Port

STOP = 9
"""Kind of a request, and tag of a message, that ends a worker."""
JOIN_S = 30.0
WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does: "expert" or "ep", as `rank` among `ranks`."""

    work: str
    rank: int
    ranks: tuple[int, ...]
    layout: Layout
    num_tokens: int = 0
    hidden_size: int = 0
    top_k: int = 0


@contextmanager
def workers(run_id: str, jobs: Sequence[Job]) -> Iterator[None]:
    """Starts the jobs' processes; they end by a message, or are killed on the way out."""
    command = [sys.executable, "-m", "xdeepserve.xccl.bench_workers", run_id]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for _ in jobs]
    try:
        for process, job in zip(started, jobs, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(asdict(job)))
            process.stdin.close()
        yield
        for process in started:
            process.wait(JOIN_S)
    finally:
        for process in started:
            process.kill()
            process.wait()


def pin_to_core_of(rank: int) -> None:
    """Pins this process: ranks go round the cores it may use."""
    cores = available_cores()
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def available_cores() -> list[int]:
    """Numbers of the cores this process may use; by then cached, as pinning narrows them."""
    if not _CORES:
        _CORES.extend(sorted(os.sched_getaffinity(0)))
    return _CORES


_CORES: list[int] = []


def routing(job: Job, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(hidden_states, topk_ids, topk_weights, expert_rank): eight experts a rank, random ids."""
    rng = np.random.default_rng(seed)
    owners = [rank for rank in job.ranks if job.work == "ep" or rank != 0]
    expert_rank = np.repeat(np.array(owners, np.int32), 8)
    hidden = rng.standard_normal((job.num_tokens, job.hidden_size), dtype=np.float32)
    picks = [rng.permutation(len(expert_rank))[: job.top_k] for _ in range(job.num_tokens)]
    weights = rng.random((job.num_tokens, job.top_k), dtype=np.float32)
    return hidden, np.array(picks, np.int32), weights, expert_rank


def expert(port: Port, job: Job) -> None:
    """Answers each pair with a row; computes nothing, so that only the way is measured."""
    while True:
        for batch in port.poll(1.0):
            if batch.kind == STOP:
                batch.reply(ANSWERS[:1].reshape(1, 1))
                return
            if batch.reply_rows * job.hidden_size <= MOST_COPIED_ITEMS:
                batch.reply(answers(batch.reply_rows, job.hidden_size))
            else:
                answer_in_place(batch, job.hidden_size)


def ep_step(port: Port, group: EpGroup, job: Job, step_idx: int, made: tuple) -> None:  # type: ignore[type-arg]
    """One dispatch, recv, answer, combine of an EP rank."""
    hidden, ids, weights, expert_rank = made
    tag = Tag(1, step_idx, 0, 0)
    exchange = group.dispatch(
        tag=tag, hidden_states=hidden, topk_ids=ids, expert_rank=expert_rank, timeout_s=WAIT_S
    )
    answer(group, group.recv(tag, WAIT_S), job.hidden_size)
    group.combine(exchange, weights, hidden_size=job.hidden_size, timeout_s=WAIT_S)


def answer(group: EpGroup, batches: list[Batch], hidden_size: int) -> None:
    """With as many rows as there are pairs: small ones copied, large ones in place."""
    num_rows = sum(batch.reply_rows for batch in batches)
    if num_rows * hidden_size <= MOST_COPIED_ITEMS:
        group.reply(batches, answers(num_rows, hidden_size))
        return
    for batch in batches:
        answer_in_place(batch, hidden_size)


def answer_in_place(batch: Batch, hidden_size: int) -> None:
    """As an expert does whose last product writes straight into its answer's place."""
    place = batch.answer_buffer(batch.reply_rows, hidden_size)
    if place is not None:
        place.fill(0.5)
        batch.commit(batch.reply_rows, hidden_size)


def answers(num_rows: int, hidden_size: int) -> F32:
    """[num_rows, hidden_size] as an expert that computes elsewhere has them."""
    return ANSWERS[: num_rows * hidden_size].reshape(num_rows, hidden_size)


MOST_COPIED_ITEMS = 16 << 10
"""A view of the place of an answer takes longer than copying up to so many float32."""
ANSWERS = np.zeros(MOST_COPIED_ITEMS, np.float32)


def ep(port: Port, job: Job) -> None:
    """A rank of the group; rank 0 says by signal how many steps there are, in all so far."""
    group = EpGroup(port, job.ranks)
    made = routing(job, port.rank)
    done = 0
    while True:
        target = port.wait_signal(0, done + 1, WAIT_S, [0])
        if target >= 1 << 62:
            return
        for step_idx in range(done, target):
            ep_step(port, group, job, step_idx, made)
        done = target


def main() -> None:
    """Entry of a worker process."""
    fields = json.load(sys.stdin)
    layout = Layout(**fields.pop("layout"))
    job = Job(layout=layout, **fields)
    job_ranks = tuple(job.ranks)
    pin_to_core_of(job.rank)
    with Port(sys.argv[1], f"r{job.rank}", job.rank, layout=layout) as port:
        port.wait_linked(job_ranks if job.work == "ep" else [0], JOIN_S)
        {"expert": expert, "ep": ep}[job.work](port, job)


if __name__ == "__main__":
    main()
