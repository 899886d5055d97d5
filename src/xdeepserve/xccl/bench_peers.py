"""Other libraries' round trips in the same run, where they are installed: never a dependency.

OpenMPI over shared memory (mpi4py and mpirun), ZeroMQ over ipc (pyzmq), gloo (torch). Each peer's
two sides are processes of this file, pinned as XCCL's are; rank 0 prints its times as JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xdeepserve.xccl.bench_workers import pin_to_core_of

LIMIT_S = 120.0
NUM_WARM = 10
MAX_ROUNDS = 5000

Exchange = Callable[[np.ndarray], None]  # sends the array there; fills it with what comes back


def measure(sizes: Sequence[int], seconds: float, report: Callable[[str], None]) -> dict[str, Any]:
    """Round trips by peer and size, in microseconds; a reason where a peer is left out."""
    results: dict[str, Any] = {}
    for name, module in (("openmpi", "mpi4py"), ("zeromq", "zmq"), ("gloo", "torch")):
        if importlib.util.find_spec(module) is None:
            results[name] = f"{module} is not installed"
        elif name == "openmpi" and shutil.which("mpirun") is None:
            results[name] = "mpirun is not installed"
        else:
            results[name] = _run(name, sizes, seconds)
        report(f"peer {name}: {_describe(results[name])}")
    return results


def _describe(result: Any) -> str:
    if isinstance(result, str):
        return result
    return ", ".join(f"{size} bytes {times['p50']:.2f} us" for size, times in result.items())


def _run(name: str, sizes: Sequence[int], seconds: float) -> Any:
    job = json.dumps({"sizes": list(sizes), "seconds": seconds})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "xdeepserve.xccl.bench_peers", name, job, folder]
        if name == "openmpi":
            commands = [["mpirun", "--allow-run-as-root", "--bind-to", "none", "-n", "2", *command]]
        else:
            commands = [[*command, "0"], [*command, "1"]]
        started = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
        try:
            outputs = [process.communicate(timeout=LIMIT_S)[0] for process in started]
        except subprocess.TimeoutExpired:
            return f"no result within {LIMIT_S} s"
        finally:
            for process in started:
                process.kill()
                process.wait()
    lines = outputs[0].splitlines()
    return json.loads(lines[-1]) if lines else "failed to run"


def _serve(rank: int, exchange: Exchange, job: dict[str, Any]) -> None:
    """Both sides run the same rounds: rank 0 chooses how many and times them."""
    results = {}
    for size in job["sizes"]:
        data = np.ones(size, np.uint8)
        start = time.perf_counter()
        for _ in range(NUM_WARM):
            exchange(data)
        per_round = (time.perf_counter() - start) / NUM_WARM
        count = np.array([min(MAX_ROUNDS, max(NUM_WARM, job["seconds"] / per_round))], np.int64)
        exchange(count)  # rank 1 takes over rank 0's number
        times = np.empty(int(count[0]))
        for i in range(len(times)):
            start_ns = time.perf_counter_ns()
            exchange(data)
            times[i] = time.perf_counter_ns() - start_ns
        p50, p99 = np.percentile(times, (50, 99)) / 1e3
        results[str(size)] = {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}
    if rank == 0:
        sys.stdout.write(json.dumps(results) + "\n")


def _mpi(rank_text: str, folder: str) -> tuple[int, Exchange]:
    world: Any = importlib.import_module("mpi4py.MPI").COMM_WORLD
    rank = world.Get_rank()

    def exchange(data: np.ndarray) -> None:
        if rank == 0:
            world.Send(data, dest=1)
            world.Recv(data, source=1)
        else:
            world.Recv(data, source=0)
            world.Send(data, dest=0)

    return rank, exchange


def _zeromq(rank_text: str, folder: str) -> tuple[int, Exchange]:
    zmq: Any = importlib.import_module("zmq")
    rank = int(rank_text)
    socket = zmq.Context.instance().socket(zmq.PAIR)
    address = f"ipc://{folder}/pair"
    _ = socket.bind(address) if rank == 0 else socket.connect(address)

    def take(data: np.ndarray) -> None:
        data.view(np.uint8)[:] = np.frombuffer(socket.recv(copy=False).buffer, np.uint8)

    def exchange(data: np.ndarray) -> None:
        if rank == 0:
            socket.send(data, copy=False)
            take(data)
        else:
            take(data)
            socket.send(data, copy=False)

    return rank, exchange


def _gloo(rank_text: str, folder: str) -> tuple[int, Exchange]:
    torch: Any = importlib.import_module("torch")
    distributed: Any = importlib.import_module("torch.distributed")
    torch.set_num_threads(1)
    rank = int(rank_text)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )

    def exchange(data: np.ndarray) -> None:
        tensor = torch.from_numpy(data)
        if rank == 0:
            distributed.send(tensor, 1)
            distributed.recv(tensor, 1)
        else:
            distributed.recv(tensor, 0)
            distributed.send(tensor, 0)

    return rank, exchange


def main() -> None:
    """One side of one peer: NAME JOB FOLDER [RANK]."""
    name, job, folder, *rest = sys.argv[1:]
    rank_text = rest[0] if rest else os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    pin_to_core_of(int(rank_text))
    connect = {"openmpi": _mpi, "zeromq": _zeromq, "gloo": _gloo}[name]
    rank, exchange = connect(rank_text, folder)
    _serve(rank, exchange, json.loads(job))


if __name__ == "__main__":
    main()
