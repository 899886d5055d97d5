"""XCCL alone: two processes that find each other, play ping-pong, and exchange rows.

    python examples/03_xccl_pingpong.py

The child answers 1000 messages, then serves one exchange as an "expert" that doubles rows. Prints
the median round trip and what came back.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import numpy as np

from xdeepserve.xccl import Layout, Port, Tag

ROUNDS = 1000
LAYOUT = Layout(max_ranks=2)  # equal on both sides


def pin(rank: int) -> None:
    """Gives each side a core of its own where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def child(run_id: str) -> None:
    """Rank 1: echo, then one answer."""
    pin(1)
    with Port(run_id, "child", 1, layout=LAYOUT) as port:
        port.wait_linked([0])
        ball = np.zeros(8, np.uint8)
        for _ in range(ROUNDS):
            port.recv(0, ball)
            port.send(0, ball)
        for batch in port.poll(timeout_s=10.0):
            batch.reply(batch.rows * np.float32(2))


def main() -> None:
    """Rank 0: starts the child, serves first, then asks."""
    run_id = f"pingpong{os.getpid()}"
    other = subprocess.Popen([sys.executable, __file__, run_id])
    pin(0)
    with Port(run_id, "parent", 0, layout=LAYOUT) as port:
        port.wait_linked([1])
        ball, times = np.arange(8, dtype=np.uint8), []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            port.send(1, ball)
            port.recv(1, ball)
            times.append(time.perf_counter() - start)
        print(f"median round trip: {statistics.median(times) * 1e6:.2f} us")

        rows = np.arange(6, dtype=np.float32).reshape(2, 3)
        with port.exchange(rows) as exchange:
            exchange.add(1, tag=Tag(epoch=1, step_idx=0, layer_idx=0, microbatch_idx=0))
            exchange.wait(timeout_s=10.0)
            (reply,) = exchange.replies()
            print(f"sent {rows.tolist()}, received {reply.rows.tolist()}")
            assert np.array_equal(reply.rows, rows * 2)
    assert other.wait(timeout=10.0) == 0


if __name__ == "__main__":
    child(sys.argv[1]) if len(sys.argv) > 1 else main()
