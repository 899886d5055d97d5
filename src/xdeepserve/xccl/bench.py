"""How long does XCCL take, beside what the machine allows and beside other libraries?

Point-to-point round trips from 8 bytes to 16 MiB; a2e + e2a and dispatch + combine over tokens,
hidden sizes and top-k. Ceilings measured in the same run: a cache line to another core and back,
and memcpy. Ranks are pinned round the cores; experts compute nothing. The last line of the report
is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from xdeepserve import _xccl
from xdeepserve.xccl import bench_peers
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

Report = Callable[[str], None]
Numbers = dict[str, Any]

P2P_SIZES = (8, 64, 512, 4096, 65536, 1 << 20, 16 << 20)
MIN_ROUNDS, MAX_ROUNDS = 10, 20000
MESH_LAYOUT = Layout(max_ranks=2, request_bytes=64, reply_bytes=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure.

    Attributes:
        seconds: time per point.
        sizes: bytes of point-to-point messages.
        num_tokens, hidden_sizes, top_ks, num_ranks: the grid of row exchanges; ranks count the
            asking one.
        with_peers: measure other libraries too, where they can be imported.
    """

    seconds: float = 0.3
    sizes: Sequence[int] = P2P_SIZES
    num_tokens: Sequence[int] = (1, 32, 256)
    hidden_sizes: Sequence[int] = (576, 7168)
    top_ks: Sequence[int] = (2, 8)
    num_ranks: Sequence[int] = (2, 4, 6)
    with_peers: bool = True


def run_bench(options: BenchOptions, report: Report) -> Numbers:
    """Measures everything, reports lines of text as it goes, and returns the numbers.

    Times are microseconds, `p50` and `p99`. Needs the machine for itself: ranks spin.
    """
    cores = available_cores()
    numbers: Numbers = {"cores": len(cores), "seconds_per_point": options.seconds}
    numbers["ceilings"] = ceilings(cores, report)
    numbers["p2p"] = p2p(options, report)
    if options.with_peers:
        numbers["peers"] = bench_peers.measure(options.sizes, options.seconds, report)
    numbers["a2e_e2a"] = grid(options, "expert", report)
    numbers["dispatch_combine"] = grid(options, "ep", report)
    report(json.dumps(numbers))
    return numbers


def ceilings(cores: list[int], report: Report) -> Numbers:
    """What the machine allows: one cache line there and back; copying memory."""
    line_us = _xccl.cache_line_round_trip(cores[0], cores[-1]) * 1e6
    report(f"ceiling: cache line to core {cores[-1]} and back {line_us:.2f} us")
    copies = {}
    for size in (65536, 1 << 20, 16 << 20):
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        times = timed(partial(np.copyto, target, source), 0.1)
        copies[str(size)] = times
        report(f"ceiling: memcpy of {size} bytes {times['p50']:.2f} us")
    return {"cache_line_round_trip_us": line_us, "memcpy_us": copies}


def timed(call: Callable[[], object], seconds: float, rounds: int | None = None) -> Numbers:
    """p50 and p99 of one call in microseconds, over `seconds` or `rounds`, after a warm-up."""
    if rounds is None:
        rounds = rounds_for(call, seconds)
    times = np.empty(rounds)
    for i in range(rounds):
        start = time.perf_counter_ns()
        call()
        times[i] = time.perf_counter_ns() - start
    p50, p99 = np.percentile(times, (50, 99)) / 1e3
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "rounds": rounds}


def rounds_for(call: Callable[[], object], seconds: float) -> int:
    """Warms up with MIN_ROUNDS calls and says how many fit the time, by the fastest of them."""
    fastest = math.inf
    for _ in range(MIN_ROUNDS):
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return int(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds / max(fastest, 1e-7))))


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


def p2p(options: BenchOptions, report: Report) -> Numbers:
    """Round trips of one message each way between two processes, both receiving into buffers."""
    results = {}
    with mesh([Job("echo", 1, (0, 1), MESH_LAYOUT)], MESH_LAYOUT) as port:
        for size in options.sizes:
            results[str(size)] = p2p_size(port, size, options.seconds)
            line = results[str(size)]
            report(f"p2p {size} bytes: p50 {line['p50']:.2f} us, p99 {line['p99']:.2f} us")
        port.send(1, np.zeros(1, np.uint64))
    return results


def p2p_size(port: Port, size: int, seconds: float) -> Numbers:
    """One size: a few rounds to find how many fit, then as many."""
    data, out = np.ones(size, np.uint8), np.zeros(size, np.uint8)

    def call() -> None:
        port.send(1, data, 0, WAIT_S)
        port.recv(1, out, WAIT_S)

    announce(port, size, MIN_ROUNDS)
    rounds = rounds_for(call, seconds)
    announce(port, size, rounds)
    return timed(call, seconds, rounds)


def announce(port: Port, size: int, rounds: int) -> None:
    """Tells the echo what follows."""
    port.send(1, np.array([size << 32 | rounds], np.uint64), STOP)


def grid(options: BenchOptions, work: str, report: Report) -> list[Numbers]:
    """Every point of the grid of row exchanges."""
    return [
        exchange_point(work, (tokens, hidden, top_k, ranks), options.seconds, report)
        for ranks in options.num_ranks
        for hidden in options.hidden_sizes
        for top_k in options.top_ks
        for tokens in options.num_tokens
    ]


def exchange_point(
    work: str, shape: tuple[int, int, int, int], seconds: float, report: Report
) -> Numbers:
    """One point: (tokens, hidden, top_k, ranks)."""
    num_tokens, hidden_size, top_k, num_ranks = shape
    layout = Layout.for_rows(
        max_ranks=num_ranks, max_rows=num_tokens, hidden_size=hidden_size, top_k=top_k, row_slots=2
    )
    ranks = tuple(range(num_ranks))
    jobs = [Job(work, rank, ranks, layout, num_tokens, hidden_size, top_k) for rank in ranks]
    with mesh(jobs[1:], layout) as port:
        measure = ep_times if work == "ep" else a2e_times
        times = measure(port, jobs[0], seconds)
    name = "dispatch+combine" if work == "ep" else "a2e+e2a"
    report(
        f"{name} {num_tokens} tokens x {hidden_size}, top-{top_k}, {num_ranks} ranks: "
        f"p50 {times['p50']:.1f} us, p99 {times['p99']:.1f} us"
    )
    return {
        "tokens": num_tokens,
        "hidden": hidden_size,
        "top_k": top_k,
        "ranks": num_ranks,
        **times,
    }


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

    times = timed(call, seconds)
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
    times = timed(call, seconds, rounds)
    announce_steps(1 << 62)
    return times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--seconds", type=float, default=0.3, help="time per point")
    parser.add_argument("--full", action="store_true", help="the whole grid, not its corners")
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    options = BenchOptions(seconds=arguments.seconds, with_peers=not arguments.no_peers)
    if arguments.full:
        options = BenchOptions(
            seconds=arguments.seconds,
            with_peers=not arguments.no_peers,
            sizes=[8 << 2 * i for i in range(10)] + [16 << 20],
            num_tokens=(1, 8, 32, 128, 256),
            hidden_sizes=(576, 2048, 4096, 7168),
            top_ks=(2, 4, 8),
            num_ranks=(2, 3, 4, 5, 6),
        )
    run_bench(options, lambda line: _write(line))
    return 0


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """`python -m xdeepserve.xccl.bench`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
