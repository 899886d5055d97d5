"""How fast does our own server answer, and what is its highest output rate under a TPOT SLO?

For each dtype: starts the server, runs a closed loop after a warm-up, then (with `--tpot-slo-ms`)
the SLO search. Client and server share the machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import asdict
from typing import Any

from xdeepserve.launch.server_process import ServerProcess
from xdeepserve.loadgen.bench_serve import BenchConfig, describe, run_bench
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.report import json_line, machine_fingerprint, print_metrics
from xdeepserve.loadgen.runner import Limit
from xdeepserve.loadgen.slo_search import SearchConfig, run_search, verdict
from xdeepserve.loadgen.workload import LengthDistribution, WorkloadConfig


def bench_config(args: argparse.Namespace) -> BenchConfig:
    """The closed-loop run that the flags describe."""
    workload = WorkloadConfig(
        input_len=LengthDistribution("fixed", args.input_len),
        output_len=LengthDistribution("fixed", args.output_len),
    )
    return BenchConfig(
        workload=workload,
        concurrency=args.concurrency,
        limit=Limit(args.waves * args.concurrency),
        num_warmups=args.concurrency,
    )


async def measure(url: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Closed loop and, when asked for, the search, against one running server."""
    config = bench_config(args)
    async with HttpClient(url) as client:
        closed_loop = await run_bench(client, model, config)
        print_metrics(closed_loop.metrics)
        results: dict[str, Any] = {"closed_loop": asdict(closed_loop.metrics)}
        results["client_cpu_share"] = closed_loop.client_cpu_share
        if args.tpot_slo_ms:
            search = SearchConfig(bench=config, tpot_slo_ms=args.tpot_slo_ms, waves=args.waves)
            found = await run_search(client, model, search, on_probe=lambda probe: None)
            print(verdict(found))
            results["slo_search"] = asdict(found)
    return results


def main() -> int:
    """Measure every dtype and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m-moe8", help="name or folder")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "int8"])
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--waves", type=int, default=4, help="requests = waves x concurrency")
    parser.add_argument("--tpot-slo-ms", type=float, default=50.0, help="0 = no search")
    args = parser.parse_args()
    results = {}
    for dtype in args.dtype:
        print(f"== {args.model}, {dtype}")
        with ServerProcess(args.model, "--dtype", dtype) as server:
            results[dtype] = asyncio.run(measure(server.url, server.model, args))
    document = {
        "benchmark": "serving",
        "model": args.model,
        "config": describe(bench_config(args)),
        "machine": machine_fingerprint(),
        "results": results,
    }
    print(json_line(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
