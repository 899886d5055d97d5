"""Online workloads: the project's load generator against an engine's OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from benchmarks.peers.environment import Unavailable, peers_folder
from benchmarks.peers.peer import START_TIMEOUT_S, STOP_TIMEOUT_S, Peer, Server, Settings
from benchmarks.peers.workloads import OnlineWorkload

from xdeepserve.loadgen.bench_serve import BenchConfig, run_bench
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import ClientError
from xdeepserve.loadgen.runner import Limit
from xdeepserve.loadgen.slo_search import SearchConfig, run_search
from xdeepserve.loadgen.workload import LengthDistribution, WorkloadConfig

POLL_S: Final = 0.25


def measure_online(
    peer: Peer, model: str, variant: str, settings: Settings, workload: OnlineWorkload, seed: int
) -> dict[str, float]:
    """Start the server, run the workload, stop the server; metrics by name.

    Raises:
        Unavailable: there is no server, it did not start, or a request failed.
    """
    server = peer.server(model, variant, settings, _free_port())
    with _running(server, f"{peer.name}-{model}-{variant}-server"):
        try:
            return asyncio.run(_load(server, workload, seed))
        except ClientError as exc:
            raise Unavailable(f"a request failed: {exc}") from exc


async def _load(server: Server, workload: OnlineWorkload, seed: int) -> dict[str, float]:
    bench = BenchConfig(
        workload=WorkloadConfig(
            input_len=LengthDistribution("fixed", workload.input_len),
            output_len=LengthDistribution("fixed", workload.output_len),
            seed=seed,
        ),
        concurrency=workload.clients,
        limit=Limit(workload.waves * workload.clients),
        num_warmups=workload.clients,
    )
    async with HttpClient(f"http://127.0.0.1:{server.port}") as client:
        if workload.tpot_slo_ms:
            search = SearchConfig(
                bench=replace(bench, num_warmups=4),
                tpot_slo_ms=workload.tpot_slo_ms,
                max_concurrency=64,
                waves=workload.waves,
            )
            found = await run_search(client, server.model, search, on_probe=lambda probe: None)
            return {"output tok/s": found.best.output_tokens_per_s if found.best else 0.0}
        metrics = (await run_bench(client, server.model, bench)).metrics
    if metrics.num_failed or metrics.num_wrong_length or not metrics.tpot_ms:
        raise Unavailable(f"wrong answers: {metrics.errors or metrics.num_wrong_length}")
    assert metrics.ttft_ms is not None, "there are completed requests"
    return {
        "output tok/s": metrics.output_tokens_per_s,
        "tpot_ms_mean": metrics.tpot_ms.mean,
        "tpot_ms_p99": metrics.tpot_ms.p99,
        "ttft_ms_p50": metrics.ttft_ms.p50,
    }


@contextmanager
def _running(server: Server, name: str) -> Iterator[None]:
    log = peers_folder() / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            server.command.argv,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=server.command.environ,
        )
    try:
        _wait_until_healthy(process, server.port)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise Unavailable(f"its server ended with code {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=POLL_S):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_S)
    raise Unavailable(f"its server was not healthy after {START_TIMEOUT_S:g} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
