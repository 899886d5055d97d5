"""What do keys, budgets and the ledger cost? The same load on an open service and on one with them.

Two servers of one model take turns with a closed loop of streaming clients; the open one is the
ceiling of the other. In the end the ledger must hold exactly what the clients counted. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from xdeepserve import envs
from xdeepserve.launch.accounts import opened_database
from xdeepserve.launch.server_process import ServerProcess
from xdeepserve.loadgen.bench_serve import BenchConfig, describe, run_bench
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.report import json_line, machine_fingerprint
from xdeepserve.loadgen.runner import Limit
from xdeepserve.loadgen.workload import LengthDistribution, WorkloadConfig
from xdeepserve.maas.accounts.accounts import Accounts
from xdeepserve.maas.ledger.budgets import MAX_MICRO, Budgets
from xdeepserve.maas.ledger.usage import usage
from xdeepserve.maas.ledger.usage_row import DAY_US, UsageQuery

PRICES = 'version: "bench"\nmodels: {"*": {default: {input: 100_000, output: 400_000}}}\n'


def bench_config(args: argparse.Namespace, seed: int) -> BenchConfig:
    """The load of one turn."""
    return BenchConfig(
        workload=WorkloadConfig(
            input_len=LengthDistribution("fixed", args.input_len),
            output_len=LengthDistribution("fixed", args.output_len),
            seed=seed,
        ),
        concurrency=args.concurrency,
        limit=Limit(args.waves * args.concurrency),
        num_warmups=0,
    )


def make_key() -> str:
    """The secret of a tenant with a budget, in the database of the environment."""
    with opened_database() as database:
        accounts = Accounts(database)
        accounts.create_tenant("bench")
        Budgets(database).add_credit("bench", MAX_MICRO)
        return accounts.create_key("bench", "k").secret


async def rate(server: ServerProcess, key: str | None, config: BenchConfig) -> tuple[float, int]:
    """(output tokens/s, output tokens) of one turn."""
    async with HttpClient(server.url, api_key=key) as client:
        metrics = (await run_bench(client, server.model, config)).metrics
    assert not metrics.num_failed, metrics.errors
    return metrics.output_tokens_per_s, metrics.num_output_tokens


def charged_tokens() -> int:
    """Completion tokens in the ledger."""
    with opened_database() as database:
        (row,) = usage(database, UsageQuery(from_us=0, to_us=366 * DAY_US * 60, groups=()))
    return row.completion_tokens


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Take turns; the first of each is a warm-up."""
    (folder / "prices.yaml").write_text(PRICES)
    flags = [args.model, "--dtype", args.dtype, "--max-num-seqs", str(args.concurrency)]
    rates: dict[str, list[float]] = {"open": [], "with accounts": []}
    counted = 0
    with ExitStack() as stack:
        open_server = stack.enter_context(ServerProcess(*flags))
        stack.enter_context(envs.DATABASE_URL.override(f"sqlite:///{folder / 'service.db'}"))
        key = make_key()
        env = {envs.DATABASE_URL.name: os.environ[envs.DATABASE_URL.name]}
        prices = ["--prices", str(folder / "prices.yaml")]
        with ServerProcess(*flags, *prices, env=env) as keyed_server:
            for turn in range(args.repeats + 1):
                config = bench_config(args, turn)
                for name, server, secret in (
                    ("open", open_server, None),
                    ("with accounts", keyed_server, key),
                ):
                    tokens_per_s, num_tokens = asyncio.run(rate(server, secret, config))
                    counted += num_tokens if secret else 0
                    if turn:
                        rates[name].append(tokens_per_s)
                        print(f"{name}: {tokens_per_s:,.0f} output tok/s", flush=True)
        charged = charged_tokens()  # all is settled when the server has stopped
    assert charged == counted, f"{charged} tokens charged, {counted} counted by clients"
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    return {"rates": rates, "ratio": median(ratios), "ratios": ratios, "tokens_charged": charged}


def main() -> int:
    """Measure, print the ratio and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="name or folder")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--waves", type=int, default=2, help="requests = waves x concurrency")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, Path(folder))
    open_rate, keyed_rate = (median(values) for values in results["rates"].values())
    print(
        f"open (the ceiling) {open_rate:,.0f}, with accounts {keyed_rate:,.0f} output tok/s; "
        f"median of the ratios {results['ratio']:.3f}; {results['tokens_charged']} tokens charged, "
        "as counted by the clients"
    )
    document = {
        "benchmark": "accounts",
        "model": args.model,
        "dtype": args.dtype,
        "config": describe(bench_config(args, 0)),
        "machine": machine_fingerprint(),
        **results,
    }
    print(json_line(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
