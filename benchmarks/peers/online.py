"""Online workloads: the project's load generator against an engine's OpenAI-compatible server.

The highest rate within a TPOT is searched for in the first repeat. Later ones measure a tenth more
load than was found last, or, where it is too much, the highest one below that is not.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import replace
from typing import Final

from benchmarks.peers.environment import Unavailable, peers_folder
from benchmarks.peers.peer import START_TIMEOUT_S, Peer, Settings
from benchmarks.peers.turns import TurnProcess
from benchmarks.peers.workloads import MAX_SEQS, OnlineWorkload

from xdeepserve.loadgen.bench_serve import BenchConfig, run_bench
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import ClientError
from xdeepserve.loadgen.runner import Limit
from xdeepserve.loadgen.slo_search import Probe, SearchConfig, measure_point, run_search
from xdeepserve.loadgen.workload import LengthDistribution, WorkloadConfig

POLL_S: Final = 0.25


class ServerProcess:
    """A server that answers when it is its turn; use as a context manager."""

    def __init__(self, peer: Peer, model: str, variant: str, settings: Settings) -> None:
        """Start it and wait until it is healthy.

        Raises:
            Unavailable: there is no server, or it did not start.
        """
        self._server = peer.server(model, variant, settings, _free_port())
        self._found: dict[str, int] = {}  # workload -> concurrency
        path = peers_folder() / f"{peer.name}-{model}-{variant}-server.log"
        command = self._server.command
        with path.open("w") as log:
            self._turns = TurnProcess(
                command.argv, command.environ, log, stdin=subprocess.DEVNULL, stdout=log
            )
        try:
            with self._turns.turn():
                _wait_until_healthy(self._turns.process, self._server.port)
        except BaseException:  # also when this program is told to end
            self._turns.stop()
            raise

    @property
    def pid(self) -> int:
        """Process id of the server, and of its group."""
        return self._turns.pid

    def measure(self, workload: OnlineWorkload, seed: int) -> dict[str, float]:
        """Run the workload; metrics by name.

        Raises:
            Unavailable: a request failed.
        """
        with self._turns.turn():
            try:
                return asyncio.run(self._run(workload, seed))
            except ClientError as exc:
                raise Unavailable(f"a request failed: {exc}") from exc

    async def _run(self, workload: OnlineWorkload, seed: int) -> dict[str, float]:
        bench = _bench(workload, seed)
        async with HttpClient(f"http://127.0.0.1:{self._server.port}") as client:
            if not workload.tpot_slo_ms:
                return await _measure(client, self._server.model, bench)
            search = SearchConfig(
                bench=replace(bench, num_warmups=4),
                tpot_slo_ms=workload.tpot_slo_ms,
                max_concurrency=MAX_SEQS,
                waves=workload.waves,
            )
            best = await self._best(client, workload.name, search)
        if best is None:
            return {"output tok/s": 0.0, "clients": 0}
        return {
            "output tok/s": best.output_tokens_per_s,
            "tpot_ms_mean": best.mean_tpot_ms,
            "clients": best.concurrency,
        }

    async def _best(self, client: HttpClient, name: str, search: SearchConfig) -> Probe | None:
        if name in self._found:
            held = await _hold(client, self._server.model, search, self._found[name])
            self._found[name] = held.concurrency if held else 0
            return held
        found = await run_search(client, self._server.model, search, on_probe=lambda probe: None)
        self._found[name] = found.best.concurrency if found.best else 0
        return found.best

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._turns.stop()


def _bench(workload: OnlineWorkload, seed: int) -> BenchConfig:
    return BenchConfig(
        workload=WorkloadConfig(
            input_len=LengthDistribution("fixed", workload.input_len),
            output_len=LengthDistribution("fixed", workload.output_len),
            seed=seed,
        ),
        concurrency=workload.clients,
        limit=Limit(workload.waves * workload.clients),
        num_warmups=workload.clients,
    )


async def _measure(client: HttpClient, model: str, bench: BenchConfig) -> dict[str, float]:
    metrics = (await run_bench(client, model, bench)).metrics
    if metrics.num_failed or metrics.num_wrong_length or not metrics.tpot_ms:
        raise Unavailable(f"wrong answers: {metrics.errors or metrics.num_wrong_length}")
    assert metrics.ttft_ms is not None, "there are completed requests"
    return {
        "output tok/s": metrics.output_tokens_per_s,
        "tpot_ms_mean": metrics.tpot_ms.mean,
        "tpot_ms_p99": metrics.tpot_ms.p99,
        "ttft_ms_p50": metrics.ttft_ms.p50,
    }


async def _hold(
    client: HttpClient, model: str, search: SearchConfig, concurrency: int
) -> Probe | None:
    """The highest of some loads, from a tenth above `concurrency` down, that keeps the SLO."""
    concurrency = min(search.max_concurrency, concurrency + max(1, concurrency // 10))
    while concurrency > 0:
        probe = await measure_point(client, model, search, concurrency)
        if probe.is_within_slo:
            return probe
        concurrency = min(concurrency - 1, concurrency * 9 // 10)
    return None


def _wait_until_healthy(process: subprocess.Popen[str], port: int) -> None:
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
